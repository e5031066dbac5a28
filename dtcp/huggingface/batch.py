"""A batch as transformers' collators make it, cut for the ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dtcp.batch import ShardedBatch, shard_batch
from dtcp.distributed.mesh import ParallelMesh
from dtcp.labels import shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail, SequenceLayout


def shard_hf_batch(
    batch: Mapping[str, Tensor],
    mesh: ParallelMesh,
    layout: type[SequenceLayout] = HeadTail,
    *,
    model: nn.Module,
    device: torch.device | str | None = None,
) -> tuple[dict[str, Tensor], ShardedBatch]:
    """Cut a batch of transformers into this rank's part.

    Args:
        batch: whole rows on the host: input_ids or inputs_embeds; maybe labels, not shifted, as
            transformers has them; position_ids, which restart at every packed document;
            attention_mask [B, S], 0 for padding on the right.
    Returns:
        the local batch, with labels shifted and position_ids, and how it was sharded. Call
        `model(input_ids=..., position_ids=..., attn_metadata=sharded.attn_metadata)` and compute
        the loss by token_mean_loss: the model's own loss would shift labels inside a shard.
    Raises:
        ValueError: padding on the left or in the middle, or what shard_batch refuses.
    """
    documents = documents_of_hf_batch(batch)
    whole = {key: x for key, x in batch.items() if key != "attention_mask"}
    whole["position_ids"] = documents.position_ids()
    if "labels" in batch:
        whole["labels"] = shift_labels(batch["labels"], documents)
    return shard_batch(whole, mesh, layout, model=model, documents=documents, device=device)


def causal_lm_loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    mesh: ParallelMesh,
    layout: type[SequenceLayout] = HeadTail,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Run a model of parallelize_hf on a batch: this rank's share of the mean loss over tokens.

    The shares of the ranks of mesh.loss add up to the mean loss of all their tokens, and their
    gradients to its gradient.

    Args:
        batch: as shard_hf_batch takes it, with labels.
    Raises:
        ValueError: no labels, or what shard_hf_batch refuses.
    """
    if "labels" not in batch:
        raise ValueError(
            f"A batch to train on has labels, not shifted, got {sorted(batch)}: add them; a "
            f"language model's are its input_ids."
        )
    local, sharded = shard_hf_batch(batch, mesh, layout, model=model, device=device)
    labels = local.pop("labels")
    local.pop("padding_mask", None)
    logits = model(**local, attn_metadata=sharded.attn_metadata).logits
    return token_mean_loss(logits, labels, global_token_count(labels, mesh.loss))


def documents_of_hf_batch(batch: Mapping[str, Tensor]) -> Documents:
    """The documents of every row: position_ids restart, attention_mask ends the last one.

    Raises:
        ValueError: a mask of another shape, padding anywhere but on the right, or position_ids
            that do not count each document from 0.
    """
    tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]
    rows, seq_len = tokens.shape[:2]
    mask = batch.get("attention_mask", torch.ones(rows, seq_len, dtype=torch.int64))
    if mask.shape != (rows, seq_len) or bool(
        (mask.diff(dim=1) > 0).any() | ~mask.bool()[:, :1].all()
    ):
        raise ValueError(
            f"An attention_mask is [B, S], 1 for tokens and then 0 for padding on the right, got "
            f"shape {tuple(mask.shape)}: pad on the right; for packed documents pass position_ids."
        )
    return Documents.from_padded(batch.get("position_ids"), mask == 0)
