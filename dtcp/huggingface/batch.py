"""A batch as transformers' collators make it, cut for the ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.batch import ShardedBatch, shard_rows
from dtcp.distributed.mesh import ParallelMesh
from dtcp.huggingface.images import IMAGES, whole_rows, with_blocks
from dtcp.huggingface.pooled_head import check_last_tokens, last_token_mixer
from dtcp.huggingface.router_logits import balance_loss_of_batch, balance_weight, is_balanced
from dtcp.labels import shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.rows import DEFAULT_FIELDS, WHOLE, Rows
from dtcp.sequence.arguments import check_batch, check_kind, check_tensor, rows_of
from dtcp.sequence.buckets import Buckets
from dtcp.sequence.documents import Documents
from dtcp.sequence.gate import (
    DOCUMENT_KEYS,
    documents_of_batch,
    documents_of_ids,
    read_padding_mask,
)
from dtcp.sequence.layout import HeadTail, SequenceLayout

LABELED_IN_PLACE = ("ForTokenClassification", "ForMaskedLM")
"""Kinds of models, in transformers' terms (`model.loss_type`), whose labels are not shifted."""
ANSWER_KEYS = ("start_positions", "end_positions")
"""Labels of question answering, [B]: tokens of whole rows."""


def shard_hf_batch(
    batch: Mapping[str, Any],
    mesh: ParallelMesh,
    layout: type[SequenceLayout] = HeadTail,
    *,
    model: nn.Module,
    device: torch.device | str | None = None,
    compare_ranks: bool = True,
    buckets: Buckets | None = None,
) -> tuple[dict[str, Tensor], ShardedBatch]:
    """Cut a batch of transformers into this rank's part.

    Args:
        batch: whole rows on the host: input_ids or inputs_embeds; maybe labels, not shifted, as
            transformers has them; position_ids, which restart at every packed document;
            attention_mask [B, S], 0 for padding on the right, or numbering packed documents from
            1; and what flattening collators add (cu_seq_lens_q, max_length_q, seq_idx, ..). A
            value of None is left out. Images (pixel_values, image_grid_thw, ..), with the
            mm_token_type_ids or token_type_ids of their tokens, are for a model that takes them:
            its rows stay whole, and it cuts them behind its vision tower.
        model: of parallelize_hf. Its kind says what labels are: those of a language model are
            shifted; those of a token classifier stay at their tokens; those of rows, and the
            start_positions and end_positions of answers, stay whole.
        compare_ranks, buckets: as for shard_batch.
    Returns:
        the local batch, with labels and position_ids, and how it was sharded. Call
        `model(input_ids=..., position_ids=..., attn_metadata=sharded.attn_metadata)` and compute
        the loss by token_mean_loss: the model's own loss would shift labels inside a shard. What
        a head gives for rows is the same on all ranks of the cp group, and a loss of it as well;
        its gradients are to be summed over them.
    Raises:
        ValueError: padding on the left or in the middle, keys that contradict each other, or what
            shard_batch refuses.
    """
    options = {"device": device, "compare_ranks": compare_ranks, "buckets": buckets}
    return _shard(batch, mesh, layout, model, for_token_loss=False, **options)


def _shard(
    batch: Mapping[str, Any],
    mesh: ParallelMesh,
    layout: type[SequenceLayout],
    model: nn.Module,
    *,
    for_token_loss: bool,
    **options: Any,
) -> tuple[dict[str, Tensor], ShardedBatch]:
    def prepare() -> Rows:
        return _rows_of(batch, model, for_token_loss=for_token_loss)

    local, sharded = shard_rows(prepare, mesh, layout, model=model, **options)
    images = {key: batch[key] for key in IMAGES if batch.get(key) is not None}
    if images:
        whole = {**whole_rows(batch, sharded.documents, model), **images}
        local = {key: x for key, x in local.items() if key not in (*whole, "position_ids")}
        device = options["device"]
        local |= {key: x if device is None else x.to(device) for key, x in whole.items()}
    return local, sharded


def causal_lm_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    mesh: ParallelMesh,
    layout: type[SequenceLayout] = HeadTail,
    *,
    device: torch.device | str | None = None,
    compare_ranks: bool = True,
    buckets: Buckets | None = None,
) -> Tensor:
    """Run a model of parallelize_hf on a batch: this rank's share of the mean loss over tokens.

    The shares of the ranks of mesh.loss add up to the mean loss of all their tokens, and their
    gradients to its gradient. With config.output_router_logits the balance loss of the experts,
    over all tokens, is part of it.

    Args:
        batch: as shard_hf_batch takes it, with labels.
        compare_ranks, buckets: as for shard_batch.
    Raises:
        ValueError: no labels, a model that gives outputs for rows, or what shard_hf_batch refuses.
    """
    check_kind("causal_lm_loss", nn.Module, model=model)
    options = {"device": device, "compare_ranks": compare_ranks, "buckets": buckets}
    local, sharded = _shard(batch, mesh, layout, model, for_token_loss=True, **options)
    labels = local.pop("labels")
    local.pop("padding_mask", None)
    balanced = {"output_router_logits": True} if is_balanced(model) else {}
    out = model(**local, attn_metadata=sharded.attn_metadata, **balanced)
    loss = token_mean_loss(out.logits, labels, global_token_count(labels, mesh.loss))
    if not balanced:
        return loss
    balance = balance_weight(model) * balance_loss_of_batch(model, out.router_logits, sharded)
    # All of its value is on every rank, and on each the gradient of that rank's tokens.
    return loss + balance - balance.detach() * (1 - 1 / mesh.size("loss"))


def _rows_of(batch: Mapping[str, Any], model: nn.Module, *, for_token_loss: bool = False) -> Rows:
    """A batch of transformers as shard_batch takes it."""
    check_batch("A batch", batch)
    rows = {key: x for key, x in batch.items() if x is not None and key not in IMAGES}
    pooling = last_token_mixer(model)
    if for_token_loss:
        _check_token_loss(model, rows, pooled=pooling is not None)
    documents = documents_of_hf_batch(rows)
    whole = {key: x for key, x in rows.items() if key not in (*DOCUMENT_KEYS, "attention_mask")}
    whole = with_blocks(whole, model)
    whole["position_ids"] = documents.position_ids()
    fields = DEFAULT_FIELDS
    if pooling is not None:
        if "input_ids" in rows:
            check_last_tokens(rows["input_ids"], documents, pooling.pad_token_id)
        fields = {**fields, "labels": WHOLE}
    elif "labels" in rows and getattr(model, "loss_type", None) not in LABELED_IN_PLACE:
        whole["labels"] = shift_labels(rows["labels"], documents)
    if getattr(model, "loss_type", None) == "ForQuestionAnswering":
        fields = {**fields, **dict.fromkeys(ANSWER_KEYS, WHOLE)}
    return Rows.of(whole, fields, documents)


def _check_token_loss(model: nn.Module, rows: Mapping[str, Any], *, pooled: bool) -> None:
    if pooled or getattr(model, "loss_type", None) == "ForQuestionAnswering":
        raise ValueError(
            f"A loss of tokens is computed of one output per token, got {type(model).__name__}: "
            f"call shard_hf_batch and the model, and compute the loss of its rows "
            f"(docs/transformers.md)."
        )
    if "labels" not in rows:
        raise ValueError(
            f"A batch to train on has labels, not shifted, got {sorted(rows)}: add them; a "
            f"language model's are its input_ids."
        )


def documents_of_hf_batch(batch: Mapping[str, Any]) -> Documents:
    """The documents of every row, from every key that transformers' collators have for them.

    Raises:
        ValueError: keys that contradict each other, padding anywhere but on the right, a mask of
            another shape or meaning, or position_ids that do not count each document from 0.
    """
    primary = "input_ids" if batch.get("input_ids") is not None else "inputs_embeds"
    check_batch("A batch", batch, primary)
    rows, seq_len = rows_of("A batch", primary, batch[primary])
    said = {key: batch.get(key) for key in ("position_ids", "padding_mask", *DOCUMENT_KEYS)}
    mask = batch.get("attention_mask")
    explicit = None
    if mask is not None:
        mask = _checked_mask(mask, rows, seq_len)
        if bool((mask > 1).any()):
            # Numbers from 1 on, as collators of packed rows have them.
            explicit = documents_of_ids(mask - 1, name="attention_mask less 1,")
        padding = read_padding_mask(said["padding_mask"], rows, seq_len)
        if padding is not None and not torch.equal(padding, mask == 0):
            raise ValueError(
                "A batch says once what is padding, got an attention_mask (0: padding) and a "
                "padding_mask (1: padding) that differ: pass one of them."
            )
        said["padding_mask"] = mask == 0
    documents = documents_of_batch(said, rows, seq_len, documents=explicit, name="attention_mask")
    if said["position_ids"] is not None:
        _check_counted(said["position_ids"], documents)
    return documents


def _checked_mask(mask: Tensor, rows: int, seq_len: int) -> Tensor:
    """An attention_mask [B, S] on the host, of whole numbers: 0 for padding on the right."""
    check_tensor("A batch", shape="[B, S]", attention_mask=mask)
    if mask.shape != (rows, seq_len):
        raise ValueError(
            f"An attention_mask is [B, S], 1 for tokens and then 0 for padding on the right, got "
            f"shape {tuple(mask.shape)} for {rows} rows of {seq_len}: pad on the right; for packed "
            f"documents pass position_ids."
        )
    mask = mask.cpu()
    odd = (mask != mask.long()) | (mask < 0)
    if bool(odd.any()):
        row, token = odd.nonzero()[0].tolist()
        raise ValueError(
            f"An attention_mask [B, S] is 1 for tokens and 0 for padding, got attention_mask[{row},"
            f" {token}]={mask[row, token].item()}: give the mask of the tokenizer, not one that "
            f"is added to scores."
        )
    mask = mask.long()
    left = (mask[:, 1:] != 0) & (mask[:, :-1] == 0)
    if bool(left.any()):
        row, token = left.nonzero()[0].tolist()
        raise ValueError(
            f"An attention_mask is 1 for tokens and then 0 for padding on the right, got padding "
            f"at token {token} of row {row} with a token after it: pad on the right; for packed "
            f"documents pass position_ids."
        )
    return mask


def _check_counted(position_ids: Tensor, documents: Documents) -> None:
    """Refuse position ids that the documents' own could not stand for."""
    counted, document = documents.position_ids(), documents.document()
    if position_ids.ndim != 2:
        raise ValueError(
            f"Position ids of transformers' text models are one per token, got position_ids.shape="
            f"{tuple(position_ids.shape)}: give [B, S], or shard the batch by shard_batch."
        )
    wrong = (position_ids.cpu() != counted) & (document >= 0)
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        given = position_ids.expand(documents.batch, -1)[row, token].item()
        raise ValueError(
            f"Position ids count each document from 0, got position_ids[{row}, {token}]={given} "
            f"at token {counted[row, token].item()} of document {document[row, token].item()}: "
            f"leave position_ids out, or shard the batch by shard_batch to keep others."
        )
