"""Packed rows without a batch dim (THD): one after another, each document in a slot of its own.

A slot is a document and the padding behind it. Every slot is cut head-tail by itself, in 2n chunks:
the rule of Transformer Engine's thd_get_partitioned_indices, which PerDocument follows wherever 2n
divides a slot.

    slots of 4 and 8 tokens, n=2        rank 0: 0 3 4 5 10 11        rank 1: 1 2 6 7 8 9
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtcp.labels import IGNORED
from dtcp.rows import pad_end
from dtcp.sequence.arguments import (
    WHOLE_NUMBERS,
    check_batch,
    check_ints,
    check_rank,
    check_tensor,
    is_whole,
    rows_of,
)
from dtcp.sequence.batch_documents import read_padding_mask
from dtcp.sequence.documents import Documents
from dtcp.sequence.host import on_host
from dtcp.sequence.per_document import PerDocument
from dtcp.sequence.restarts import check_restarts

THDBatch = Mapping[str, Any]
"""Packed rows, with or without a batch dim, and what goes with them."""

Slots = tuple[tuple[int, int], ...]
"""(tokens of the document, tokens of its slot), first to last."""

SENTINEL = -1000
"""Fills up the lengths of rows that have fewer documents than others."""


def thd_layout(cu_seqlens_padded: Sequence[int], total: int, num_shards: int) -> PerDocument:
    """Which tokens each rank holds.

    Args:
        cu_seqlens_padded: where slots start and end: [N + 1].
        total: tokens, all of them in slots.
    Raises:
        ValueError: tokens outside of slots, or slots that 2n does not divide.
    """
    check_ints("THD", least=1, total=total, num_shards=num_shards)
    _check_bounds("cu_seqlens_padded", cu_seqlens_padded)
    lengths = tuple(b - a for a, b in pairwise(cu_seqlens_padded))
    lengths = tuple(length for length in lengths if length)
    odd = [length for length in lengths if length % (2 * num_shards)]
    if odd:
        raise ValueError(
            f"THD cuts every slot in 2 * num_shards equal chunks, got seq_lens_padded={odd[:8]} "
            f"with num_shards={num_shards}: pad documents to multiples of {2 * num_shards}."
        )
    if sum(lengths) != total:
        raise ValueError(
            f"Slots fill the rows, got {sum(lengths)} tokens in slots, of {total}: lengthen the "
            f"last one."
        )
    return PerDocument(total, num_shards, lengths)


def partition_indices(cu_seqlens_padded: Tensor, total: int, num_shards: int, rank: int) -> Tensor:
    """Indices of a rank's tokens, in its order: [total / n], int64.

    Args:
        cu_seqlens_padded: [N + 1]; entries below zero are left out.
    """
    bounds = read_bounds("cu_seqlens_padded", cu_seqlens_padded)
    check_ints("THD", least=1, num_shards=num_shards)
    check_rank("THD", rank, num_shards)
    return thd_layout(bounds, total, num_shards).token_indices(rank)


@on_host
def to_thd(batch: THDBatch, *, seq_lens_padding_value: int = SENTINEL) -> dict[str, Any]:
    """Take the batch dim off packed rows: [B, S, ...] to [B * S, ...].

    Args:
        batch: input_ids [B, S] (or embeddings [B, S, E]) or inputs_embeds, labels [B, S],
            seq_lens and seq_lens_padded [B, N]; position_ids [B, S] or [axes, B, S], of one
            row for all or of each, counted through each slot if missing. Other tensors of
            [B, S, ...] are flattened likewise; any other value stays as it is.
    Returns:
        the same keys, and cu_seqlens [N + 1] int32, the cumulated lengths of documents;
        cu_seqlens_padded [N + 1] int32, those of slots; max_seqlen, int32, the longest slot;
        padding_mask [B * S], True for padding; qkv_format.
    Raises:
        KeyError: a key that is missing.
        ValueError: both or neither of input_ids and inputs_embeds; lengths that do not fit.
    """
    rows, seq_len = _check(batch)
    slots_of_rows = _slots(batch, seq_len, seq_lens_padding_value)
    slots = [*chain.from_iterable(slots_of_rows)]
    documents = Documents(tuple(tuple(b for _, b in row if b) for row in slots_of_rows), seq_len)
    position_ids = documents.position_ids()
    lengths, sizes = torch.tensor(slots).unbind(1)
    padding = position_ids >= lengths.repeat_interleave(sizes).view(rows, seq_len)
    _check_agrees(batch, documents, padding)
    device = batch["labels"].device
    bounds = list(accumulate((slot for _, slot in slots), initial=0))
    out = {key: x for key, x in batch.items() if key not in ("seq_lens", "seq_lens_padded")}
    out = {key: _flat(key, x, rows, seq_len) for key, x in out.items() if x is not None}
    if "position_ids" not in out:
        out["position_ids"] = position_ids.flatten().to(device)
    out["padding_mask"] = padding.flatten().to(device)
    ends = accumulate((length for length, _ in slots), initial=0)
    out["cu_seqlens"] = torch.tensor(list(ends), dtype=torch.int32, device=device)
    out["cu_seqlens_padded"] = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(slot for _, slot in slots)
    out["max_seqlen"] = torch.tensor(longest, dtype=torch.int32, device=device)
    return {**out, "qkv_format": "thd"}


@on_host
def shard_thd(batch: THDBatch, axis: DeviceMesh) -> dict[str, Any]:
    """This rank's tokens of what `to_thd` made; boundaries stay those of the whole.

    No communication. `cp_size` and `cp_rank` are added.
    """
    rank, total = axis.get_local_rank(), batch["labels"].shape[0]
    mine = partition_indices(batch["cu_seqlens_padded"], total, axis.size(), rank)
    mine = mine.to(batch["labels"].device)
    out = dict(batch)
    for key, x in batch.items():
        if key in _BOUNDARIES or not isinstance(x, Tensor):
            continue
        if key == "position_ids":
            out[key] = x.index_select(x.ndim - 1, mine)
        elif x.ndim and x.shape[0] == total:
            out[key] = x.index_select(0, mine)
    return {**out, "cp_size": axis.size(), "cp_rank": rank}


def primary_key(batch: Mapping[str, Any]) -> str:
    """The key of what the model reads, input_ids or inputs_embeds.

    Raises:
        ValueError: both or neither.
    """
    check_batch("A batch", batch)
    present = [key for key in ("input_ids", "inputs_embeds") if batch.get(key) is not None]
    if len(present) != 1:
        raise ValueError(
            f"A batch has either input_ids or inputs_embeds, got {present or 'neither'}: pass one."
        )
    return present[0]


def row_slots(
    seq_lens: Tensor, seq_lens_padded: Tensor, seq_len: int, sentinel: int = SENTINEL
) -> list[Slots]:
    """The slots of each row, from lengths [B, N] that a sentinel fills up.

    Raises:
        ValueError: lengths that do not fit each other, or the row.
    """
    both = (seq_lens, seq_lens_padded)
    named: dict[str, Any] = {"seq_lens": seq_lens, "seq_lens_padded": seq_lens_padded}
    check_tensor("Packed rows", shape="[B, documents]", dtypes=WHOLE_NUMBERS, **named)
    if any(x.ndim != 2 or len(x) != len(seq_lens) for x in both):
        raise ValueError(
            f"The documents of each row are counted in a row of their own, got seq_lens.shape="
            f"{tuple(seq_lens.shape)}, seq_lens_padded.shape={tuple(seq_lens_padded.shape)}: give "
            f"[B, documents] each, filled with {sentinel}."
        )
    rows = []
    for row, (lengths, slots) in enumerate(zip(*(x.tolist() for x in both), strict=True)):
        lengths, slots = ([x for x in xs if x != sentinel] for xs in (lengths, slots))
        fits = len(lengths) == len(slots) and sum(slots) <= seq_len
        if not fits or any(not 0 <= a <= b for a, b in zip(lengths, slots, strict=True)):
            raise ValueError(
                f"Documents fit their slots, and slots their row, got seq_lens={lengths}, "
                f"seq_lens_padded={slots} in row {row} of {seq_len} tokens: cut or pack fewer."
            )
        rows.append(tuple(zip(lengths, slots, strict=True)))
    return rows


def row_chunks(
    batch: THDBatch,
    num_chunks: int,
    *,
    padding_token_id: int = 0,
    seq_lens_padding_value: int = SENTINEL,
) -> list[dict[str, Any]]:
    """Cut a batch into chunks of equally many rows; rows of padding fill up the last ones."""
    rows, seq_len = _check(batch)
    check_ints("A batch cut into chunks", num_chunks=num_chunks)
    if not 1 <= num_chunks <= rows:
        raise ValueError(
            f"A chunk has one row at least, got num_chunks={num_chunks} for {rows} rows: use "
            f"between 1 and {rows}."
        )
    per_chunk = -(-rows // num_chunks)
    missing = per_chunk * num_chunks - rows
    fill = {"input_ids": padding_token_id, "labels": IGNORED, "padding_mask": True}
    fill |= dict.fromkeys(("seq_lens", "seq_lens_padded"), seq_lens_padding_value)
    chunks: list[dict[str, Any]] = [{} for _ in range(num_chunks)]
    for key, x in batch.items():
        x = _of_each_row(key, x, rows)
        dim = _row_dim(key, x, rows, seq_len)
        if dim is None:
            parts: Sequence[Any] = [x] * num_chunks
        else:
            parts = pad_end(x, missing, fill.get(key, 0), dim=dim).split(per_chunk, dim=dim)
        for chunk, part in zip(chunks, parts, strict=True):
            chunk[key] = part
    return chunks


_BOUNDARIES = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")


def _check(batch: THDBatch) -> tuple[int, int]:
    """(rows, tokens per row)."""
    lengths = ("seq_lens", "seq_lens_padded")
    check_batch("A batch of packed rows", batch, "labels", *lengths)
    primary = primary_key(batch)
    rows, seq_len = rows_of("A batch of packed rows", primary, batch[primary])
    check_tensor("Packed rows", shape="[B, S]", labels=batch["labels"])
    for key in lengths:
        named: dict[str, Any] = {key: batch[key]}
        check_tensor("Packed rows", shape="[B, documents]", dtypes=WHOLE_NUMBERS, **named)
        if batch[key].ndim != 2 or len(batch[key]) != rows:
            raise ValueError(
                f"The documents of each row are counted in a row of {key}, got {key}.shape="
                f"{tuple(batch[key].shape)} for {rows} rows: give [B, documents]."
            )
    if batch["labels"].shape != (rows, seq_len):
        raise ValueError(
            f"Labels go with tokens, got labels.shape={tuple(batch['labels'].shape)} for {rows} "
            f"rows of {seq_len}: shift and pad them in whole rows."
        )
    return rows, seq_len


def _slots(batch: THDBatch, seq_len: int, sentinel: int) -> list[Slots]:
    """The slots of each row; the tokens behind them lengthen its last one."""
    filled: list[Slots] = []
    for slots in row_slots(batch["seq_lens"], batch["seq_lens_padded"], seq_len, sentinel):
        *before, (length, slot) = slots or ((0, 0),)
        slot += seq_len - sum(slot for _, slot in (*before, (length, slot)))
        filled.append((*before, (length, slot)))
    return filled


def _check_agrees(batch: THDBatch, documents: Documents, padding: Tensor) -> None:
    """Refuse position ids and padding that contradict the slots."""
    position_ids, mask = batch.get("position_ids"), batch.get("padding_mask")
    if position_ids is not None:
        check_restarts(documents, position_ids, padding, name="seq_lens")
    mask = read_padding_mask(mask, *padding.shape)
    if mask is not None and not torch.equal(mask, padding):
        row, token = (mask != padding).nonzero()[0].tolist()
        raise ValueError(
            f"A batch says once what is padding, got padding_mask[{row}, {token}]="
            f"{bool(mask[row, token])} with token {token} of row {row} in "
            f"{'padding' if padding[row, token] else 'a document'} by seq_lens: correct one of "
            f"them, or leave padding_mask out."
        )


def _flat(key: str, x: Any, rows: int, seq_len: int) -> Any:
    x = _of_each_row(key, x, rows)
    dim = _row_dim(key, x, rows, seq_len)
    if dim is None or x.shape[dim + 1 : dim + 2] != (seq_len,):
        return x
    flat = x.flatten(dim, dim + 1)
    # A RoPE of several axes keeps a batch dim of one row: [axes, 1, T].
    return flat.unsqueeze(1) if dim else flat


def _of_each_row(key: str, x: Any, rows: int) -> Any:
    """Position ids of one row, [1, S] or [axes, 1, S], stand for those of all."""
    if key != "position_ids" or not isinstance(x, Tensor) or x.ndim < 2 or x.shape[-2] != 1:
        return x
    return x.expand(*x.shape[:-2], rows, -1)


def _row_dim(key: str, x: Any, rows: int, seq_len: int) -> int | None:
    """The dim of rows: the first, or the second of a RoPE of several axes; None without rows.

    Only tensors of tokens and the lengths have rows; others may count images, or anything else.
    """
    if not isinstance(x, Tensor):
        return None
    if key == "position_ids" and x.ndim == 3:
        return 1
    tokens = x.shape[:2] == (rows, seq_len)
    return 0 if tokens or key in ("seq_lens", "seq_lens_padded") else None


def read_bounds(name: str, cu_seqlens: Tensor) -> list[int]:
    """Boundaries without what fills them up, which is below zero."""
    named: dict[str, Any] = {name: cu_seqlens}
    check_tensor("THD", shape="[N + 1]", ndim=1, dtypes=WHOLE_NUMBERS, **named)
    bounds: list[int] = [x for x in cu_seqlens.tolist() if x >= 0]
    _check_bounds(name, bounds)
    return bounds


def _check_bounds(name: str, bounds: Sequence[int]) -> None:
    """Refuse boundaries that do not start at 0, or that descend: tokens would move."""
    if not isinstance(bounds, Sequence) or not all(map(is_whole, bounds)):
        raise TypeError(
            f"Boundaries of THD are whole numbers, got {name}={bounds!r}: give [N + 1] ints."
        )
    if list(bounds[:1]) != [0] or any(b < a for a, b in pairwise(bounds)):
        raise ValueError(
            f"Boundaries of THD start at 0 and do not descend, got {name}={list(bounds)}: give "
            f"where each document starts and the last one ends."
        )
