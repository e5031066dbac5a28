"""A batch for Gemma 4 as NeMo Automodel shards it: contiguously, by a hook of the model.

The names and signatures are those of nemo_automodel.components.models.gemma4_moe.cp_batch. What
each rank attends to is worked out here as well, from whole rows and without communication: the ring
over contiguous shards is RingAttention, of which each step applies its part of the mask.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp.cp_utils.batch import MODEL_OWNED, PACKED_SEQ_IDS, BatchDict
from dtcp.cp_utils.context import ContextFactory
from dtcp.cp_utils.seq_padding import _pad_position_ids_seq_dim_, _pad_tensor_seq_dim_
from dtcp.cp_utils.validation import agreed_padding, check_one_document, check_rows
from dtcp.distributed.same_rows import compared_keys, prepared_alike
from dtcp.labels import IGNORED
from dtcp.mixer_metadata import collect_metadata, mixers_of
from dtcp.mixer_ranks import check_ranks
from dtcp.sequence.arguments import check_batch, check_kind
from dtcp.sequence.batch_documents import check_restarts_in_stretches
from dtcp.sequence.block_runs import vision_blocks
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.host import on_host
from dtcp.sequence.layout import Contiguous
from dtcp.thd import primary_key

PreparedBatch = tuple[str, int, Tensor, Tensor, int, Tensor | None]
"""What `_prepare_manual_cp_batch` returns."""

GROUPS = "_gemma4_vision_group_ids"
SEQ_DIMS, PAD_VALUES = "_cp_metadata_seq_dims", "_cp_metadata_pad_values"


def prepare_model_inputs_for_cp(
    model: nn.Module, batch: Mapping[str, Any], *, image_features: Tensor | None = None
) -> BatchDict:
    """Prepare a batch of whole rows for sharding, as Gemma 4 needs it.

    Images are numbered in whole rows, image features replace the embeddings of their tokens, and
    `_cp_make_batch_fn` becomes the model's own sharder. The sharded batch then has
    `attn_metadata`, for the model's forward.

    Args:
        model: dtcp.models.gemma4.Gemma4. Under FSDP its `embed` is registered as a forward method
            (torch's register_fsdp_forward_method) where image_features are given.
        batch: whole rows, alike on every rank of the axis.
        image_features: [tokens of images, E], in order; from a tower that no mesh axis shards.
    Raises:
        ValueError: no mm_token_type_ids, although the model sees images as blocks; another number
            of features than of image tokens.
    """
    check_kind("prepare_model_inputs_for_cp", nn.Module, model=model)
    check_batch("A batch", batch)
    batch = dict(batch)
    config: Any = model.config
    types = batch.get("mm_token_type_ids")
    if types is None and (config.vision_blocks or image_features is not None):
        raise ValueError(
            "Gemma4 sees the tokens of an image as one block, got a batch without "
            "mm_token_type_ids: pass them, [B, S], zeros where there is no image."
        )
    if types is not None:
        batch[GROUPS] = vision_blocks(types)
    if image_features is not None:
        batch = _embedded(model, batch, image_features)
    batch[MODEL_OWNED] = partial(_shard_for, model)
    return batch


def make_contiguous_shard_cp_batch_and_ctx(
    cp_mesh: DeviceMesh | None,
    tp_mesh: DeviceMesh | None,
    batch: Mapping[str, Any],
    loss_mask: Tensor | None = None,
    padding_token_id: int = 0,
) -> tuple[ContextFactory, BatchDict]:
    """Prepare a batch and keep this rank's stretch of it; the batch passed in stays as it is.

    Args:
        cp_mesh: the 1-D axis of the sequence; None: one rank.
        batch: whole rows, alike on every rank: input_ids or inputs_embeds, labels; maybe
            position_ids, padding_mask or attention_mask, `_packed_seq_ids` [B, S] (1, 2, .. by
            document, 0 for padding), mm_token_type_ids, per_layer_inputs [B, S, layers, P].
        loss_mask: [B, S]; stands for labels where there are none.
    Returns:
        a context that does nothing, and the local batch.
    Raises:
        ValueError: both or neither of input_ids and inputs_embeds; rows of several lengths, or
            of several documents without `_packed_seq_ids`.
        KeyError: no labels and no loss_mask.
    """
    check_batch("A batch", batch)
    whole = dict(batch)

    def prepare() -> PreparedBatch:
        prepared = _prepare_manual_cp_batch(cp_mesh, tp_mesh, whole, loss_mask)
        _synthesize_single_document_seq_ids(whole, *prepared[:2])
        ids, position_ids = whole[PACKED_SEQ_IDS], whole["position_ids"]
        check_restarts_in_stretches(ids, position_ids, name=PACKED_SEQ_IDS)
        return prepared

    prepared = prepared_alike((cp_mesh, tp_mesh), prepare, lambda _: compared_keys(batch))
    return _make_contiguous_shard_cp_batch(cp_mesh, whole, *prepared, padding_token_id)


def _prepare_manual_cp_batch(
    cp_mesh: DeviceMesh | None,
    tp_mesh: DeviceMesh | None,
    batch: BatchDict,
    loss_mask: Tensor | None,
) -> PreparedBatch:
    """Find what is sharded, add position_ids, and turn an attention_mask into a padding_mask.

    The batch itself changes.

    Returns:
        (key of what the model reads, tokens per row, labels, position_ids, their sequence dim,
        loss_mask).
    """
    mask = batch.pop("attention_mask", None)
    padding = agreed_padding(mask, batch.get("padding_mask"))
    if padding is not None:
        batch["padding_mask"] = padding
    primary = primary_key(batch)
    check_rows(batch, primary, (primary, "labels", "padding_mask", PACKED_SEQ_IDS))
    if batch.get(PACKED_SEQ_IDS) is None:
        check_one_document(
            {**batch, "attention_mask": mask},
            batch.get("padding_mask"),
            remedy=f"give {PACKED_SEQ_IDS} [B, S], 1, 2, .. by document and 0 for padding",
            unread=("seq_lens", "cu_seqlens"),
        )
    rows, seq_len = batch[primary].shape[:2]
    position_ids = batch.get("position_ids")
    if position_ids is None:
        position_ids = torch.arange(seq_len, device=batch[primary].device)[None]
    if position_ids.ndim == 2 and position_ids.shape[0] == 1 and rows > 1:
        position_ids = position_ids.expand(rows, -1)
    batch["position_ids"] = position_ids = position_ids.contiguous()
    labels = batch.get("labels")
    if labels is None:
        labels, loss_mask = loss_mask, None
    if labels is None:
        raise KeyError("labels: a batch to train on has them, or a loss_mask in their place.")
    return primary, seq_len, labels, position_ids, 2 if position_ids.ndim == 3 else 1, loss_mask


def _synthesize_single_document_seq_ids(batch: BatchDict, primary_key: str, seq_len: int) -> None:
    """Add `_packed_seq_ids` of one document per row if there are none: 1, and 0 for padding.

    Runs before padding is added, whose id is 0 too.
    """
    if batch.get(PACKED_SEQ_IDS) is not None:
        return
    padding = batch.get("padding_mask")
    if padding is not None:
        batch[PACKED_SEQ_IDS] = (~padding.bool()).long()
    else:
        like = batch[primary_key]
        batch[PACKED_SEQ_IDS] = torch.ones(
            like.shape[0], seq_len, dtype=torch.int64, device=like.device
        )


def _make_contiguous_shard_cp_batch(
    cp_mesh: DeviceMesh | None,
    batch: Mapping[str, Any],
    primary_key: str,
    seq_len: int,
    labels: Tensor,
    position_ids: Tensor,
    pos_seq_dim: int,
    loss_mask: Tensor | None,
    padding_token_id: int,
) -> tuple[ContextFactory, BatchDict]:
    """Pad rows to a multiple of twice the ranks and keep this rank's stretch of every key."""
    batch = {**batch, "labels": labels, "position_ids": position_ids}
    if loss_mask is not None:
        batch["loss_mask"] = loss_mask
    ranks = 1 if cp_mesh is None else cp_mesh.size()
    rank = 0 if cp_mesh is None else cp_mesh.get_local_rank()
    missing = -seq_len % (2 * ranks)
    layout = Contiguous(seq_len + missing, ranks)
    pads: dict[str, float | int | bool] = {
        "input_ids": padding_token_id,
        "inputs_embeds": 0.0,
        "mm_token_type_ids": 0,
        PACKED_SEQ_IDS: 0,
        "per_layer_inputs": 0.0,
        "padding_mask": True,
        "labels": IGNORED,
        "loss_mask": 0,
    }
    dims = {**dict(batch.pop(SEQ_DIMS, {})), **dict.fromkeys(pads, 1)}
    pads = {**dict(batch.pop(PAD_VALUES, {})), **pads}
    for key, dim in dims.items():
        if batch.get(key) is not None:
            whole = _pad_tensor_seq_dim_(batch[key], dim, missing, pads.get(key, 0))
            batch[key] = layout.shard(whole, rank, dim=dim).contiguous()
    counted = _pad_position_ids_seq_dim_(position_ids, pos_seq_dim, missing)
    batch["position_ids"] = layout.shard(counted, rank, dim=pos_seq_dim).contiguous()
    return nullcontext, batch


@on_host
def _shard_for(
    model: nn.Module,
    cp_mesh: DeviceMesh | None,
    tp_mesh: DeviceMesh | None,
    batch: Mapping[str, Any],
    *,
    loss_mask: Tensor | None = None,
    padding_token_id: int = 0,
) -> tuple[ContextFactory, BatchDict]:
    """The model's own sharder: `make_contiguous_shard_cp_batch_and_ctx` plus mixers' metadata."""
    extra = {SEQ_DIMS: {**batch.get(SEQ_DIMS, {}), GROUPS: 1}}
    extra[PAD_VALUES] = {**batch.get(PAD_VALUES, {}), GROUPS: -1}
    context, local = make_contiguous_shard_cp_batch_and_ctx(
        cp_mesh, tp_mesh, {**batch, **extra}, loss_mask, padding_token_id
    )
    # Ranks have compared their batches above, so one that raises here leaves no other waiting.
    whole = dict(batch)
    key, seq_len, *_ = _prepare_manual_cp_batch(cp_mesh, tp_mesh, whole, loss_mask)
    _synthesize_single_document_seq_ids(whole, key, seq_len)
    ranks = 1 if cp_mesh is None else cp_mesh.size()
    missing = -seq_len % (2 * ranks)
    documents = _documents(whole[PACKED_SEQ_IDS].cpu(), whole.get("padding_mask"), missing)
    block = whole.get(GROUPS)
    if block is not None:
        block = _pad_tensor_seq_dim_(block.cpu(), 1, missing, -1)
    layout = Contiguous(documents.seq_len, ranks)
    position_ids = _pad_position_ids_seq_dim_(whole["position_ids"].cpu(), -1, missing)
    coords = Coords.of(documents, block=block, position_ids=position_ids)
    check_ranks(mixers_of(model), cp_mesh)
    attn_metadata = collect_metadata(model, coords, layout)
    local["attn_metadata"] = attn_metadata.to(local[key].device)
    return context, local


def _documents(seq_ids: Tensor, padding: Tensor | None, missing: int) -> Documents:
    """Documents from ids. Padding between tokens is a document that no other token sees."""
    if padding is not None:
        seq_ids = seq_ids.masked_fill(padding.bool().cpu(), 0)
    rows = []
    for row, ids in enumerate(seq_ids):
        runs, lengths = ids.unique_consecutive(return_counts=True)
        real = runs[runs > 0]
        if real.numel() != real.unique().numel():
            raise ValueError(
                f"A document lies in one stretch of its row, got _packed_seq_ids with an id in "
                f"several stretches of row {row}: give each document an id of its own."
            )
        counts = lengths.tolist()
        rows.append(tuple(counts[:-1] if runs.numel() and runs[-1] == 0 else counts))
    return Documents(tuple(rows), seq_ids.shape[1] + missing)


def _embedded(model: Any, batch: BatchDict, features: Tensor) -> BatchDict:
    """Whole rows of embeddings, image features in their places; gradients reach both."""
    config: Any = model.config
    ids, vision = batch.pop("input_ids"), batch[GROUPS] >= 0
    if features.shape[0] != int(vision.sum()):
        raise ValueError(
            f"Every token of an image has a feature, got {features.shape[0]} of them for "
            f"{int(vision.sum())} tokens: pass as many, in order."
        )
    text = ids if config.pad_id is None else ids.masked_fill(vision, config.pad_id)
    embeds: Tensor = model.embed(text)
    batch["inputs_embeds"] = embeds.masked_scatter(vision[..., None], features.to(embeds.dtype))
    if config.per_layer_dim:
        batch["per_layer_inputs"] = model.per_layer.look_up(text)
    return batch
