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
        `model(input_ids=..., position_ids=..., attn_metadata=sharded.attn_metadata)` and take the
        loss with token_mean_loss: the model's own shifts labels inside a shard.
    Raises:
        ValueError: padding on the left or in the middle, or what shard_batch refuses.
    """
    documents = documents_of(batch)
    whole = {key: x for key, x in batch.items() if key != "attention_mask"}
    whole["position_ids"] = documents.position_ids()
    if "labels" in batch:
        whole["labels"] = shift_labels(batch["labels"], documents)
    local, plan = shard_batch(whole, mesh, layout, model=model, documents=documents, device=device)
    return local, plan


def causal_lm_loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    mesh: ParallelMesh,
    layout: type[SequenceLayout] = HeadTail,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Run a model of parallelize_hf on a batch: this rank's share of the mean loss over tokens.

    Shares add up, over the ranks of mesh.loss, to the mean over all their batches; so do
    gradients.

    Args:
        batch: as shard_hf_batch takes it, with labels.
    Raises:
        ValueError: no labels, or what shard_hf_batch refuses.
    """
    if "labels" not in batch:
        raise ValueError(
            f"A batch to train on has labels, not shifted, got {sorted(batch)}: add them, the "
            f"input_ids themselves for a language model."
        )
    local, plan = shard_hf_batch(batch, mesh, layout, model=model, device=device)
    labels = local.pop("labels")
    local.pop("padding_mask", None)
    logits = model(**local, attn_metadata=plan.attn_metadata).logits
    return token_mean_loss(logits, labels, global_token_count(labels, mesh.loss))


def documents_of(batch: Mapping[str, Tensor]) -> Documents:
    """The documents of every row: position_ids restart, attention_mask ends the last one."""
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
    position_ids = batch.get("position_ids", torch.arange(seq_len).expand(rows, seq_len))
    lengths = []
    for row, filled in enumerate(mask.bool().sum(dim=1).tolist()):
        (cuts,) = Documents.from_position_ids(position_ids[row : row + 1, :filled]).lengths
        lengths.append(cuts)
    return Documents(tuple(lengths), seq_len)
