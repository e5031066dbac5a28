"""Shard a batch of whole rows, the same on every rank, and make the context of a step."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtcp.batch import BatchCut, PreparedBatch, shard_prepared
from dtcp.cp_utils.context import ContextFactory, get_train_context
from dtcp.cp_utils.masks import documents_of_mask
from dtcp.cp_utils.thd import make_cp_batch_for_te
from dtcp.cp_utils.validation import check_one_document, check_rows
from dtcp.distributed.mesh import ParallelMesh
from dtcp.rows import DEFAULT_FIELDS, WHOLE, Rows, TokenField, pad_end
from dtcp.sdpa.local_shards import local_shards
from dtcp.sequence.arguments import check_batch, check_tensor, rows_of
from dtcp.sequence.buckets import Buckets
from dtcp.sequence.documents import Documents
from dtcp.sequence.host import on_host
from dtcp.sequence.layout import HeadTail, SequenceLayout
from dtcp.softmax.all_gather import AllGatherAttention
from dtcp.softmax.style import AttentionStyle
from dtcp.thd import SENTINEL, primary_key, row_slots

BatchDict = dict[str, Any]
MODEL_OWNED = "_cp_make_batch_fn"
"""The key of a function by which a model shards its batches itself."""

PACKED_SEQ_IDS = "_packed_seq_ids"
"""The key of document numbers, [B, S]: 1, 2, .. by document and 0 for padding."""


def make_cp_batch_and_ctx(
    device_mesh: DeviceMesh | None,
    batch: BatchDict,
    loss_mask: Tensor | None = None,
    use_te: bool = False,
    padding_token_id: int = 0,
    num_chunks: int = 1,
    seq_lens_padding_value: int = -1000,
) -> tuple[ContextFactory, BatchDict]:
    """Shard a batch, and make the context its forward pass runs in.

    The first of these that applies shards it: the model's own sharder, batch["_cp_make_batch_fn"],
    a BatchSharder or a function called like one; `use_te`, packed rows without a batch dim; on one
    rank nothing, since there is nothing to do; and otherwise the balanced default. The batch passed
    in is not changed.

    Args:
        device_mesh: with an axis "cp"; None, or no such axis: one rank.
        batch: whole rows, alike on every rank of the axis. Labels are shifted already.
        loss_mask: [B, S]; returned sharded, in the batch; on one rank, where nothing is done, not
            returned.
    Returns:
        a function that opens the context, any number of times, and the local batch.
    Raises:
        KeyError: no labels.
        ValueError: what BatchSharder refuses.
    """
    check_batch("A batch", batch)
    batch = dict(batch)
    cp_mesh, tp_mesh = _axis(device_mesh, "cp"), _axis(device_mesh, "tp")
    model_sharder = batch.pop(MODEL_OWNED, None)
    if model_sharder is not None and cp_mesh is not None:
        return model_sharder(
            cp_mesh, tp_mesh, batch, loss_mask=loss_mask, padding_token_id=padding_token_id
        )
    if cp_mesh is None and not use_te:
        return nullcontext, batch
    if loss_mask is not None:
        batch["loss_mask"] = loss_mask
    if use_te:
        return nullcontext, make_cp_batch_for_te(
            cp_mesh,
            batch,
            "thd",
            padding_token_id=padding_token_id,
            num_chunks=num_chunks,
            seq_lens_padding_value=seq_lens_padding_value,
        )
    assert cp_mesh is not None
    sharder = BatchSharder(seq_lens_padding_value=seq_lens_padding_value)
    return sharder(cp_mesh, tp_mesh, batch, padding_token_id=padding_token_id)


@dataclass(frozen=True)
class BatchSharder:
    """How the batches of a model are sharded; without arguments, as by default.

    Args:
        layout: which tokens go to which rank.
        style: how attention is carried out inside the context.
        fields: further keys that the model reads; WHOLE for those without a sequence.
        seq_lens_padding_value: fills up seq_lens of rows with fewer documents than others.
        buckets: sizes that batches are padded to, so that a compiled model has few graphs; None
            pads no further than the layout needs.
    """

    layout: type[SequenceLayout] = HeadTail
    style: AttentionStyle = field(default_factory=AllGatherAttention)
    fields: Mapping[str, TokenField | None] = field(default_factory=dict)
    seq_lens_padding_value: int = SENTINEL
    buckets: Buckets | None = None

    @on_host
    def __call__(
        self,
        cp_mesh: DeviceMesh,
        tp_mesh: DeviceMesh | None,
        batch: BatchDict,
        *,
        loss_mask: Tensor | None = None,
        padding_token_id: int = 0,
    ) -> tuple[ContextFactory, BatchDict]:
        """Shard a batch of whole rows, out of place.

        Documents are read off `seq_lens` (and `seq_lens_padded`, their slots), `position_ids` that
        restart at 0, or an `attention_mask` of four dims; otherwise each row is one. What an
        `attention_mask` or `padding_mask` marks as padding is seen by no token. The local batch
        has a `padding_mask` in place of the `attention_mask`.

        Masks and position ids are read on the host: pass them before they go to the device.

        Raises:
            KeyError: no labels.
            ValueError: both or neither of input_ids and inputs_embeds; padding that is not on
                the right; a mask or position ids of unknown meaning; a key whose sequence dim is
                not known.
        """
        axes = () if tp_mesh is None else (tp_mesh,)
        batch = dict(batch) if loss_mask is None else {**batch, "loss_mask": loss_mask}
        mesh = ParallelMesh.of_sequence(cp_mesh)

        def prepared() -> PreparedBatch:
            cut = BatchCut(mesh, self.layout, buckets=self.buckets)
            return cut.prepared(self._rows(batch, padding_token_id))

        local, sharded = shard_prepared(prepared, mesh, axes=axes)
        position_ids = batch["position_ids"]
        device = position_ids.device
        if "padding_mask" in local:
            local["padding_mask"] = local["padding_mask"].to(device)
        context = local_shards(
            sharded.layout,
            cp_mesh,
            documents=sharded.documents,
            position_ids=local["position_ids"] if position_ids.ndim == 2 else None,
            style=self.style,
            device=device,
        )
        missing = sharded.documents.batch - sharded.unpadded_rows
        for key in ("seq_lens", "seq_lens_padded"):
            if key in local:
                local[key] = pad_end(local[key], missing, self.seq_lens_padding_value, dim=0)
        return get_train_context(False, False, context), {**batch, **local}

    def _rows(self, batch: BatchDict, padding_token_id: int) -> Rows:
        """Cross-check what a batch says; adds position_ids and padding_mask to it."""
        rows, seq_len = _check(batch)
        if batch.get("seq_lens") is not None:
            documents = _documents_of_slots(batch, rows, seq_len, self.seq_lens_padding_value)
            position_ids = _position_ids(batch, rows, seq_len)
        else:
            position_ids = _position_ids(batch, rows, seq_len)
            documents = _documents(batch, position_ids, rows, seq_len)
        batch["position_ids"] = position_ids
        tensors = {key: x for key, x in batch.items() if isinstance(x, Tensor)}
        fields = _fields(tensors, self.fields, padding_token_id, seq_len)
        return Rows.of(tensors, fields, documents)


def _build_position_ids(batch: BatchDict, device: torch.device | str) -> BatchDict:
    """Add position_ids [1, S], counted from 0, if there are none; the batch itself changes.

    Raises:
        KeyError: no input_ids.
    """
    check_batch("A batch", batch)
    if "position_ids" not in batch:
        check_batch("A batch", batch, "input_ids")
        _, seq_len = rows_of("A batch", "input_ids", batch["input_ids"])
        batch["position_ids"] = torch.arange(seq_len, device=device)[None]
    return batch


def _axis(device_mesh: DeviceMesh | None, name: str) -> DeviceMesh | None:
    """The 1-D axis of that name, None if it has one rank."""
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


def _check(batch: BatchDict) -> tuple[int, int]:
    """(rows, tokens per row) of what the model reads."""
    primary = primary_key(batch)
    if batch.get("labels") is None:
        raise KeyError("labels: a batch to train on has them, shifted already, [B, S].")
    for key in [key for key, x in batch.items() if x is None]:
        del batch[key]
    check_rows(batch, primary, (primary, "labels"))
    if "seq_lens" not in batch:
        _check_documents_are_read(batch)
    rows, seq_len = batch[primary].shape[:2]
    return rows, seq_len


def _check_documents_are_read(batch: BatchDict) -> None:
    """Refuse documents given by keys that are not read here, as position ids of several axes."""
    position_ids = batch.get("position_ids")
    several_axes = (
        position_ids is not None and position_ids.ndim == 3 and batch.get("attention_mask") is None
    )
    unread = ("seq_lens_padded", "cu_seqlens")
    keys = {
        "position_ids": position_ids if several_axes else None,
        "qkv_format": batch.get("qkv_format"),
        **{key: batch.get(key) for key in unread},
    }
    check_one_document(
        keys, batch.get("padding_mask"), remedy="give seq_lens [B, documents]", unread=unread
    )


def _position_ids(batch: BatchDict, rows: int, seq_len: int) -> Tensor:
    """[B, S], or [axes, B, S] for a RoPE of several axes."""
    labels: Tensor = batch["labels"]
    position_ids: Tensor | None = batch.get("position_ids")
    if position_ids is None:
        position_ids = torch.arange(seq_len, device=labels.device)[None]
    if position_ids.ndim == 2 and position_ids.shape[0] == 1:
        position_ids = position_ids.expand(rows, -1)
    return position_ids


def _documents(batch: BatchDict, position_ids: Tensor, rows: int, seq_len: int) -> Documents:
    """The documents of rows without seq_lens; an attention_mask becomes a padding_mask."""
    mask = batch.pop("attention_mask", None)
    padding = batch.get("padding_mask")
    restarting = position_ids.cpu() if position_ids.ndim == 2 else None
    if mask is None:
        if padding is None:
            padding = torch.zeros(rows, seq_len, dtype=torch.bool)
        return Documents.from_padded(restarting, padding.bool().cpu())
    check_tensor("A batch", attention_mask=mask)
    documents = documents_of_mask(mask.cpu(), restarting, rows, seq_len)
    masked = documents.document() < 0
    if padding is not None and bool((padding.bool().cpu() != masked).any()):
        raise ValueError(
            "A batch says once what is padding, got a padding_mask (True: padding) and an "
            "attention_mask that differ: pass one of them."
        )
    batch["padding_mask"] = masked.to(position_ids.device)
    return documents


def _documents_of_slots(batch: BatchDict, rows: int, seq_len: int, sentinel: int) -> Documents:
    """Documents of rows with seq_lens; adds a padding_mask and, if missing, position_ids.

    Padding between two documents counts as a document: it sees no other token, and none sees it.
    """
    seq_lens, padded = batch["seq_lens"], batch.get("seq_lens_padded")
    slots_of_rows = row_slots(seq_lens, seq_lens if padded is None else padded, seq_len, sentinel)
    padding, index = torch.ones(rows, seq_len, dtype=torch.bool), torch.arange(seq_len)
    position_ids, lengths = index.repeat(rows, 1), []
    for row, slots in enumerate(slots_of_rows):
        start = 0
        for length, slot in slots:
            padding[row, start : start + length] = False
            position_ids[row, start:] = index[: seq_len - start]
            start += slot
        parts = [x for length, slot in slots for x in (length, slot - length)]
        lengths.append(tuple(x for x in parts if x))
    device = batch["labels"].device
    batch.setdefault("position_ids", position_ids.to(device))
    for key, padding_value in (("attention_mask", 0), ("padding_mask", 1)):
        mask = batch.get(key)
        if mask is not None and (
            mask.shape != padding.shape or bool(((mask.cpu() == padding_value) != padding).any())
        ):
            raise ValueError(
                f"A batch says once what is padding, got seq_lens and another {key} of shape "
                f"{tuple(mask.shape)}: pass one of them."
            )
    batch.pop("attention_mask", None)
    batch["padding_mask"] = padding.to(device)
    return Documents(tuple(lengths), seq_len)


def _fields(
    tensors: Mapping[str, Tensor],
    further: Mapping[str, TokenField | None],
    padding_token_id: int,
    seq_len: int,
) -> dict[str, TokenField | None]:
    """The rule of every key; one without a rule must not look as if it had a sequence."""
    fields = {**DEFAULT_FIELDS, "input_ids": TokenField(1, padding_token_id), **further}
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
