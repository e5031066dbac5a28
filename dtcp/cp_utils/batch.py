"""A batch of whole rows, alike on every rank of the axis, to this rank's part and its context."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtcp.batch import (
    DEFAULT_FIELDS,
    WHOLE,
    TokenField,
    shard_batch,
)
from dtcp.cp_utils.context import ContextFactory, get_train_context
from dtcp.cp_utils.masks import documents_of_mask
from dtcp.cp_utils.thd import make_cp_batch_for_te
from dtcp.cp_utils.validation import check_one_document, check_rows
from dtcp.distributed.mesh import ParallelMesh
from dtcp.sdpa.local_shards import local_shards
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail, SequenceLayout
from dtcp.softmax.all_gather import AllGatherAttention
from dtcp.softmax.style import AttentionStyle
from dtcp.thd import SENTINEL, row_slots

Batch = dict[str, Any]
MODEL_OWNED = "_cp_make_batch_fn"
"""The key under which a model that shards its batches in a way of its own hands that way over."""


def make_cp_batch_and_ctx(
    device_mesh: DeviceMesh | None,
    batch: Batch,
    loss_mask: Tensor | None = None,
    use_te: bool = False,
    padding_token_id: int = 0,
    num_chunks: int = 1,
    seq_lens_padding_value: int = -1000,
) -> tuple[ContextFactory, Batch]:
    """Shard a batch, and make the context its forward pass runs in.

    What decides: a sharder of the model's own (batch["_cp_make_batch_fn"], a BatchSharder or a
    function called as one); else `use_te`, packed rows without batch dim; else the balanced
    default; and on one rank nothing, for nothing is to be done. The batch given stays as it is.

    Args:
        device_mesh: with an axis "cp"; None, or no such axis: one rank.
        batch: whole rows, alike on every rank of the axis. Labels are shifted already.
        loss_mask: [B, S]; comes back sharded, in the batch.
    Returns:
        a function that opens the context, as often as asked, and the local batch.
    Raises:
        KeyError: no labels.
        ValueError: what BatchSharder refuses.
    """
    batch = dict(batch)
    cp_mesh, tp_mesh = _axis(device_mesh, "cp"), _axis(device_mesh, "tp")
    own = batch.pop(MODEL_OWNED, None)
    if own is not None and cp_mesh is not None:
        how: Mapping[str, Any] = {"loss_mask": loss_mask, "padding_token_id": padding_token_id}
        result: tuple[ContextFactory, Batch] = own(cp_mesh, tp_mesh, batch, **how)
        return result
    if loss_mask is not None:
        batch["loss_mask"] = loss_mask
    if use_te:
        how = {"seq_lens_padding_value": seq_lens_padding_value, "num_chunks": num_chunks}
        how = {**how, "padding_token_id": padding_token_id}
        return nullcontext, make_cp_batch_for_te(cp_mesh, batch, "thd", **how)
    if cp_mesh is None:
        return nullcontext, batch
    sharder = BatchSharder(seq_lens_padding_value=seq_lens_padding_value)
    return sharder(cp_mesh, tp_mesh, batch, padding_token_id=padding_token_id)


@dataclass(frozen=True)
class BatchSharder:
    """How the batches of a model are sharded; without arguments, the default.

    Args:
        layout: which tokens go to which rank.
        style: how attention is carried out inside the context.
        fields: keys of the model's own; WHOLE for those without a sequence.
        seq_lens_padding_value: fills up seq_lens of rows with fewer documents than others.
    """

    layout: type[SequenceLayout] = HeadTail
    style: AttentionStyle = field(default_factory=AllGatherAttention)
    fields: Mapping[str, TokenField | None] = field(default_factory=dict)
    seq_lens_padding_value: int = SENTINEL

    def __call__(
        self,
        cp_mesh: DeviceMesh,
        tp_mesh: DeviceMesh | None,
        batch: Batch,
        *,
        loss_mask: Tensor | None = None,
        padding_token_id: int = 0,
    ) -> tuple[ContextFactory, Batch]:
        """Shard a batch of whole rows, out of place and without communication.

        Documents are known by `seq_lens` (and `seq_lens_padded`, their slots), by `position_ids`
        that restart at 0, by an `attention_mask` of four dims, or are whole rows; what an
        `attention_mask` or `padding_mask` takes out of a row is seen by no token. The mask
        itself does not come back: `padding_mask` does.

        Reads masks and positions on the host: pass them before they are moved to the device.

        Raises:
            KeyError: no labels.
            ValueError: both or neither of input_ids and inputs_embeds; padding that is not on
                the right; a mask or positions of a meaning that is not known here; a key whose
                sequence dim is not known.
        """
        batch = dict(batch) if loss_mask is None else {**batch, "loss_mask": loss_mask}
        rows, seq_len = _check(batch)
        if batch.get("seq_lens") is not None:
            documents = _slotted(batch, rows, seq_len, self.seq_lens_padding_value)
            position_ids = _positions(batch, rows, seq_len)
        else:
            position_ids = _positions(batch, rows, seq_len)
            documents = _documents(batch, position_ids, rows, seq_len)
        batch["position_ids"] = position_ids
        tensors = {key: x for key, x in batch.items() if isinstance(x, Tensor)}
        fields = _fields(tensors, self.fields, padding_token_id, seq_len)
        mesh = ParallelMesh.of_sequence(cp_mesh)
        local, plan = shard_batch(tensors, mesh, self.layout, documents=documents, fields=fields)
        device = position_ids.device
        if "padding_mask" in local:
            local["padding_mask"] = local["padding_mask"].to(device)
        seen = local["position_ids"] if position_ids.ndim == 2 else None
        context = local_shards(
            plan.layout,
            cp_mesh,
            documents=plan.documents,
            position_ids=seen,
            style=self.style,
            device=device,
        )
        return get_train_context(False, False, context), {**batch, **local}


def _build_position_ids(batch: Batch, device: torch.device | str) -> Batch:
    """Add position_ids [1, S], counted from 0, where there are none; the batch itself changes.

    Raises:
        KeyError: no input_ids.
    """
    if "position_ids" not in batch:
        seq_len = batch["input_ids"].shape[1]
        batch["position_ids"] = torch.arange(seq_len, device=device)[None]
    return batch


def _axis(device_mesh: DeviceMesh | None, name: str) -> DeviceMesh | None:
    """The 1-D axis of that name, None where it has one rank."""
    if device_mesh is None:
        return None
    if device_mesh.mesh_dim_names is None:
        raise ValueError(
            f"A mesh has an axis named 'cp' for the sequence, got {device_mesh} without names: "
            f"give it mesh_dim_names."
        )
    if name not in device_mesh.mesh_dim_names:
        return None
    axis = device_mesh if device_mesh.ndim == 1 else device_mesh[name]
    return axis if axis.size() > 1 else None


def _check(batch: Batch) -> tuple[int, int]:
    """(rows, tokens a row) of what the model reads."""
    given = [key for key in ("input_ids", "inputs_embeds") if batch.get(key) is not None]
    if len(given) != 1:
        raise ValueError(
            f"A batch has either input_ids or inputs_embeds, got {given or 'neither'}: pass one."
        )
    if batch.get("labels") is None:
        raise KeyError("labels: a batch to train on has them, shifted already, [B, S].")
    for key in [key for key, x in batch.items() if x is None]:
        del batch[key]
    check_rows(batch, given[0], (given[0], "labels"))
    if "seq_lens" not in batch:
        _check_told(batch)
    rows, seq_len = batch[given[0]].shape[:2]
    return rows, seq_len


def _check_told(batch: Batch) -> None:
    """Refuse documents that only what nobody reads would tell; positions of one axis are read."""
    position_ids = batch.get("position_ids")
    several = (
        position_ids is not None and position_ids.ndim == 3 and batch.get("attention_mask") is None
    )
    said = {
        "position_ids": position_ids if several else None,
        "qkv_format": batch.get("qkv_format"),
    }
    said |= {key: batch.get(key) for key in ("seq_lens_padded", "cu_seqlens")}
    check_one_document(
        said,
        batch.get("padding_mask"),
        remedy="give seq_lens [B, documents]",
        unread=("seq_lens_padded", "cu_seqlens"),
    )


def _positions(batch: Batch, rows: int, seq_len: int) -> Tensor:
    """[B, S], or [axes, B, S] for a RoPE of several axes."""
    labels: Tensor = batch["labels"]
    position_ids: Tensor | None = batch.get("position_ids")
    if position_ids is None:
        position_ids = torch.arange(seq_len, device=labels.device)[None]
    if position_ids.ndim == 2 and position_ids.shape[0] == 1:
        position_ids = position_ids.expand(rows, -1)
    return position_ids


def _documents(batch: Batch, position_ids: Tensor, rows: int, seq_len: int) -> Documents:
    """Which tokens belong together; takes the attention_mask out of the batch."""
    mask = batch.pop("attention_mask", None)
    padding = batch.get("padding_mask")
    packed = position_ids.cpu() if position_ids.ndim == 2 else None
    if mask is None:
        none = torch.zeros(rows, seq_len, dtype=torch.bool)
        return Documents.from_padded(packed, none if padding is None else padding.bool().cpu())
    documents = documents_of_mask(mask.cpu(), packed, rows, seq_len)
    says = documents.document() < 0
    if padding is not None and bool((padding.bool().cpu() != says).any()):
        raise ValueError(
            "A batch says once what is padding, got a padding_mask (True: padding) and an "
            "attention_mask that differ: pass one of them."
        )
    batch["padding_mask"] = says.to(position_ids.device)
    return documents


def _slotted(batch: Batch, rows: int, seq_len: int, sentinel: int) -> Documents:
    """Documents of rows whose lengths are given; adds padding_mask and, if missing, positions.

    The padding between two documents is one more: it is seen by no other token, nor sees any.
    """
    real, padded = batch["seq_lens"], batch.get("seq_lens_padded")
    found = row_slots(real, real if padded is None else padded, seq_len, sentinel)
    padding, positions = torch.ones(rows, seq_len, dtype=torch.bool), torch.arange(seq_len)
    position_ids, lengths = positions.repeat(rows, 1), []
    for row, slots in enumerate(found):
        start = 0
        for length, slot in slots:
            padding[row, start : start + length] = False
            position_ids[row, start:] = positions[: seq_len - start]
            start += slot
        parts = [x for length, slot in slots for x in (length, slot - length)]
        lengths.append(tuple(x for x in parts if x))
    device = batch["labels"].device
    batch.setdefault("position_ids", position_ids.to(device))
    for key, says in (("attention_mask", 0), ("padding_mask", 1)):
        given = batch.get(key)
        if given is not None and (
            given.shape != padding.shape or bool(((given.cpu() == says) != padding).any())
        ):
            raise ValueError(
                f"A batch says once what is padding, got seq_lens and another {key} of shape "
                f"{tuple(given.shape)}: pass one of them."
            )
    batch.pop("attention_mask", None)
    batch["padding_mask"] = padding.to(device)
    return Documents(tuple(lengths), seq_len)


def _fields(
    tensors: Mapping[str, Tensor],
    own: Mapping[str, TokenField | None],
    padding_token_id: int,
    seq_len: int,
) -> dict[str, TokenField | None]:
    """The rule of every key; a key that nobody names must not look like one of tokens."""
    fields = {**DEFAULT_FIELDS, "input_ids": TokenField(1, padding_token_id), **own}
    fields |= dict.fromkeys(("seq_lens", "seq_lens_padded"), WHOLE)
    for key, x in tensors.items():
        if key in fields:
            continue
        if seq_len in x.shape:
            raise ValueError(
                f"The sequence dim of every key is known, got key={key!r} of shape "
                f"{tuple(x.shape)}, which may have {seq_len} tokens: name it in "
                f"BatchSharder(fields={{{key!r}: ...}}), as batch[{MODEL_OWNED!r}]."
            )
        fields[key] = WHOLE
    return fields
