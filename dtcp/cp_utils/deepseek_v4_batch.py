"""A batch for DeepSeek-V4 as NeMo Automodel shards it: contiguously, in whole windows.

`pad_multiple` keeps shards and packed documents aligned with windows, which Automodel's model
needs. Packed rows are rebuilt, document by document, before they are cut.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtcp.cp_utils.batch import PACKED_SEQ_IDS
from dtcp.cp_utils.context import ContextFactory
from dtcp.cp_utils.seq_padding import _pad_position_ids_seq_dim_, _pad_tensor_seq_dim_
from dtcp.cp_utils.validation import agreed_padding, check_one_document, check_rows
from dtcp.distributed.same_rows import compared_keys, prepared_alike
from dtcp.labels import IGNORED
from dtcp.sequence.arguments import check_batch, check_ints
from dtcp.sequence.batch_documents import check_restarts_in_stretches
from dtcp.sequence.documents import Documents
from dtcp.sequence.host import on_host
from dtcp.thd import SENTINEL, primary_key

GROUP = "_dsv4_cp_group"
POSITION_MAP = "_dsv4_cp_position_map"


@on_host
def make_dsv4_contiguous_shard_cp_batch_and_ctx(
    cp_mesh: DeviceMesh | None,
    tp_mesh: DeviceMesh | None,
    batch: Mapping[str, Any],
    loss_mask: Tensor | None = None,
    padding_token_id: int = 0,
    pad_multiple: int | None = None,
) -> tuple[ContextFactory, dict[str, Any]]:
    """Keep this rank's stretch of each row; the batch passed in stays as it is.

    Args:
        cp_mesh: the 1-D axis of the sequence; None: one rank.
        batch: whole rows, alike on every rank: input_ids or inputs_embeds, labels; maybe
            position_ids, padding_mask or attention_mask. Packed rows have seq_lens [B, documents]
            (-1000 for none), and seq_lens_padded where documents lie in longer slots.
        loss_mask: [B, S]; stands for labels where there are none.
        pad_multiple: each shard, and each packed document, is padded to a multiple of it; from
            `dsv4_cp_local_seq_multiple`.
    Returns:
        a context that does nothing, and the local batch, with the group as `_dsv4_cp_group`.
        Packed rows come with `_packed_seq_ids` (1, 2, .., 0 for padding), new seq_lens and
        seq_lens_padded, and `_dsv4_cp_position_map` [B, S], where each token went, -1 for nowhere.
    Raises:
        ValueError: both or neither of input_ids and inputs_embeds; rows of several lengths;
            padding that tokens follow; documents that do not fit their row, or that only
            positions or a mask could tell.
        KeyError: no labels and no loss_mask; packed rows without seq_lens.
        NotImplementedError: cu_seqlens alone, which do not say where rows end.
    """
    return prepared_alike(
        (cp_mesh, tp_mesh),
        lambda: _made(cp_mesh, batch, loss_mask, padding_token_id, pad_multiple),
        lambda _: compared_keys(batch),
    )


def _made(
    cp_mesh: DeviceMesh | None,
    batch: Mapping[str, Any],
    loss_mask: Tensor | None,
    padding_token_id: int,
    pad_multiple: int | None,
) -> tuple[ContextFactory, dict[str, Any]]:
    batch, multiple = _arguments(batch, pad_multiple)
    ranks = 1 if cp_mesh is None else cp_mesh.size()
    rank = 0 if cp_mesh is None else cp_mesh.get_local_rank()
    packed = _is_packed(batch)
    primary = primary_key(batch)
    padding = agreed_padding(batch.get("attention_mask"), batch.get("padding_mask"))
    if batch.get("labels") is None:
        if loss_mask is None:
            raise KeyError("labels: a batch to train on has them, or a loss_mask in their place.")
        batch["labels"], loss_mask = loss_mask, None
    if padding is not None:
        batch["padding_mask"] = padding.expand(len(batch[primary]), -1)
    if loss_mask is not None:
        batch["loss_mask"] = loss_mask
    _check(batch, primary, padding, packed=packed)
    batch.pop("attention_mask", None)
    if packed:
        packings = _packings(batch, primary, multiple)
        _check_padding(batch, packings)
        _check_positions(batch, packings, batch[primary].shape[1])
        if ranks > 1:
            batch = _repacked(batch, packings, primary, padding_token_id)
    batch = _positioned(batch, primary)
    fills = _fills(padding_token_id)
    if not packed or ranks > 1:
        batch = _padded(batch, primary, ranks * multiple, fills, packed=packed)
        batch = {key: _part(key, x, rank, ranks, fills) for key, x in batch.items()}
    if packed:
        batch["qkv_format"] = "thd"
    batch[GROUP] = None if cp_mesh is None else cp_mesh.get_group()
    return nullcontext, batch


def _arguments(batch: Mapping[str, Any], pad_multiple: int | None) -> tuple[dict[str, Any], int]:
    """A copy of the batch, and what shards and documents are padded to a multiple of."""
    check_batch("A batch", batch)
    multiple = 2 if pad_multiple is None else pad_multiple
    check_ints("A shard of DeepSeek-V4", pad_multiple=multiple)
    return dict(batch), max(multiple, 2)


def _fills(padding_token_id: int) -> dict[str, int | float | bool]:
    """What padding holds, by key; the sequence of these keys is dim 1."""
    return {
        "input_ids": padding_token_id,
        "inputs_embeds": 0.0,
        "labels": IGNORED,
        "loss_mask": 0,
        "padding_mask": True,
        PACKED_SEQ_IDS: 0,
    }


def _is_packed(batch: Mapping[str, Any]) -> bool:
    if batch.get("seq_lens") is not None:
        return True
    if batch.get("cu_seqlens") is not None:
        raise NotImplementedError(
            "Packed rows are cut by seq_lens [B, documents], got cu_seqlens without seq_lens, "
            "which do not say where a row ends: pass seq_lens."
        )
    if batch.get("qkv_format") == "thd":
        raise KeyError("seq_lens: packed rows have the lengths of documents, [B, documents].")
    return False


def _check(batch: Mapping[str, Any], primary: str, padding: Tensor | None, *, packed: bool) -> None:
    """Refuse rows of several lengths, and unpacked rows with several documents."""
    check_rows(batch, primary, _fills(0))
    if packed:
        return
    if padding is not None:
        # Padding that tokens follow would be pooled with them.
        Documents.from_padded(None, padding.bool().cpu())
    if batch.get(PACKED_SEQ_IDS) is None:
        check_one_document(batch, padding, remedy="give seq_lens [B, documents]")
    elif batch.get("position_ids") is not None:
        ids, position_ids = batch[PACKED_SEQ_IDS], batch["position_ids"]
        check_restarts_in_stretches(ids, position_ids, name=PACKED_SEQ_IDS)


def _positioned(batch: dict[str, Any], primary: str) -> dict[str, Any]:
    rows, seq_len = batch[primary].shape[:2]
    if batch.get("position_ids") is None:
        index = torch.arange(seq_len, device=batch[primary].device)
        batch["position_ids"] = index.expand(rows, -1).contiguous()
    return batch


def _padded(
    batch: dict[str, Any],
    primary: str,
    multiple: int,
    fills: Mapping[str, int | float | bool],
    *,
    packed: bool,
) -> dict[str, Any]:
    """Rows padded on the right, where positions count on; in packed rows they are 0 there."""
    missing = -batch[primary].shape[1] % multiple
    if not missing:
        return batch
    out = dict(batch)
    for key, fill in fills.items():
        if batch.get(key) is not None:
            out[key] = _pad_tensor_seq_dim_(batch[key], 1, missing, fill)
    pad = partial(_pad_tensor_seq_dim_, value=0) if packed else _pad_position_ids_seq_dim_
    out["position_ids"] = pad(batch["position_ids"], -1, missing)
    return out


def _part(key: str, x: Any, rank: int, ranks: int, fills: Mapping[str, int | float | bool]) -> Any:
    if not isinstance(x, Tensor) or (key not in fills and key != "position_ids"):
        return x
    dim = x.ndim - 1 if key == "position_ids" else 1
    length = x.shape[dim] // ranks
    return x.narrow(dim, rank * length, length).contiguous()


@dataclass(frozen=True)
class _Packing:
    """Where the documents of one row start, and how long they and their new slots are."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    slots: tuple[int, ...]

    @classmethod
    def of(cls, row: int, batch: Mapping[str, Any], seq_len: int, multiple: int) -> "_Packing":
        lengths = [int(x) for x in batch["seq_lens"][row].tolist() if x > 0]
        padded, old = batch.get("seq_lens_padded"), lengths
        if padded is not None:
            old = [int(x) for x in padded[row].tolist() if x > 0]
        fits = len(old) == len(lengths) and all(a <= b for a, b in zip(lengths, old, strict=True))
        if not fits or sum(old) > seq_len:
            raise ValueError(
                f"The documents of a row fit into it and into their slots, got seq_lens={lengths} "
                f"in slots of {old} in row {row} of {seq_len} tokens: correct them."
            )
        starts = [sum(old[:index]) for index in range(len(old))]
        slots = [-(-length // multiple) * multiple for length in lengths]
        return cls(tuple(starts), tuple(lengths), tuple(slots))


def _packings(batch: Mapping[str, Any], primary: str, multiple: int) -> list[_Packing]:
    rows, seq_len = batch[primary].shape[:2]
    for key in ("seq_lens", "seq_lens_padded"):
        counts = batch.get(key)
        if counts is not None and (counts.ndim != 2 or len(counts) != rows):
            raise ValueError(
                f"The documents of a row are counted in a row of {key}, got {key}.shape="
                f"{tuple(counts.shape)} for {rows} rows: give [B, documents], filled with "
                f"{SENTINEL}."
            )
    return [_Packing.of(row, batch, seq_len, multiple) for row in range(rows)]


def _check_padding(batch: Mapping[str, Any], packings: list[_Packing]) -> None:
    """Refuse padding among the tokens of a document: the padding or the document is wrong."""
    padding = batch.get("padding_mask")
    if padding is None:
        return
    for row, packing in enumerate(packings):
        for start, length in zip(packing.starts, packing.lengths, strict=True):
            if bool(padding[row, start : start + length].any()):
                raise ValueError(
                    f"A batch says once what is padding, got padding among the tokens {start} to "
                    f"{start + length - 1} of row {row}, which seq_lens have in a document: pass "
                    f"one of them, or correct the other."
                )


def _check_positions(batch: Mapping[str, Any], packings: list[_Packing], seq_len: int) -> None:
    """Refuse position ids that restart inside a document of seq_lens."""
    if batch.get("position_ids") is None:
        return
    numbers = torch.zeros(len(packings), seq_len, dtype=torch.int64)
    for row, packing in enumerate(packings):
        documents = zip(packing.starts, packing.lengths, strict=True)
        for number, (start, length) in enumerate(documents, start=1):
            numbers[row, start : start + length] = number
    check_restarts_in_stretches(numbers, batch["position_ids"], name="seq_lens")


def _repacked(
    batch: dict[str, Any], packings: list[_Packing], primary: str, padding_token_id: int
) -> dict[str, Any]:
    """Rows rebuilt, each document in a slot whose length is the multiple of its packing."""
    rows, seq_len = batch[primary].shape[:2]
    length = max(1, *(sum(packing.slots) for packing in packings))
    source = torch.full((rows, length), -1)
    position_ids, ids = torch.zeros_like(source), torch.zeros_like(source)
    target = torch.full((rows, seq_len), -1)
    for row, packing in enumerate(packings):
        start = 0
        for number, (first, real, slot) in enumerate(
            zip(packing.starts, packing.lengths, packing.slots, strict=True), start=1
        ):
            source[row, start : start + real] = torch.arange(first, first + real)
            target[row, first : first + real] = torch.arange(start, start + real)
            position_ids[row, start : start + slot] = torch.arange(slot)
            ids[row, start : start + slot] = number
            start += slot
    out = dict(batch)
    for key, fill in _fills(padding_token_id).items():
        if key not in (PACKED_SEQ_IDS, "padding_mask") and batch.get(key) is not None:
            out[key] = _picked(batch[key], source, fill)
    device = batch[primary].device
    out |= {"padding_mask": (source < 0).to(device), "position_ids": position_ids.to(device)}
    out |= {PACKED_SEQ_IDS: ids.to(device), POSITION_MAP: target.to(device)}
    out["seq_lens"] = _lengths([packing.lengths for packing in packings], device)
    out["seq_lens_padded"] = _lengths([packing.slots for packing in packings], device)
    return out


def _picked(x: Tensor, source: Tensor, fill: int | float | bool) -> Tensor:
    """The tokens of x [B, S, ...] with the indices in source [B, T]; fill for an index of -1."""
    index = source.to(x.device)
    rows = torch.arange(len(x), device=x.device)[:, None]
    taken = x[rows, index.clamp(min=0)]
    none = (index < 0).view(*index.shape, *[1] * (x.ndim - 2))
    return taken.masked_fill(none, fill)


def _lengths(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    longest = max(1, *(len(row) for row in rows))
    filled = [[*row, *[SENTINEL] * (longest - len(row))] for row in rows]
    return torch.tensor(filled, device=device)
