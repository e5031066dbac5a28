"""Shards a batch as transformers' collators make it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.batch import BatchCut, PreparedBatch, shard_prepared
from dtcp.distributed.gathered import free_gathered
from dtcp.distributed.gradient_sums import check_gradients_summed
from dtcp.distributed.mesh import ParallelMesh
from dtcp.huggingface.documents import documents_of_hf_batch
from dtcp.huggingface.encoder_decoder import check_labeled, encoder_name, shard_two_sequences
from dtcp.huggingface.images import IMAGES, agreed_on_images, whole_row_inputs, with_blocks
from dtcp.huggingface.install import check_has_mixers, model_with_mixers
from dtcp.huggingface.rotary_lengths import last_position
from dtcp.huggingface.router_logits import balance_loss_of_batch, balance_weight, is_balanced
from dtcp.huggingface.row_heads import gives_rows
from dtcp.huggingface.shared_prompts import with_answers
from dtcp.huggingface.token_types import without_types
from dtcp.inference_mode import no_inference_tensors
from dtcp.labels import check_not_shifted, shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.rows import DEFAULT_FIELDS, MASK_FIELDS, WHOLE, Rows
from dtcp.sequence.arguments import check_batch, check_kind
from dtcp.sequence.batch_documents import DOCUMENT_KEYS
from dtcp.sequence.buckets import Buckets
from dtcp.sequence.host import on_device, on_host
from dtcp.sequence.layout import HeadTail, SequenceLayout
from dtcp.sharded_batch import ShardedBatch

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
    prepared: Callable[[], PreparedBatch] | None = None,
) -> tuple[dict[str, Tensor], ShardedBatch]:
    """Shard a batch of transformers: this rank's part.

    Args:
        batch: whole rows on the host: input_ids or inputs_embeds; maybe labels, not shifted, as
            transformers has them; position_ids, which restart at every packed document;
            attention_mask [B, S], 0 for padding on the right, or numbering packed documents from
            1; and what flattening collators add (cu_seq_lens_q, max_length_q, seq_idx, ..). A
            value of None is left out. Images (pixel_values, image_grid_thw, ..), with the
            mm_token_type_ids or token_type_ids of their tokens, are for a model that takes them:
            its rows stay whole, and it cuts them behind its vision tower. For a model with an
            encoder input_ids and attention_mask are the encoder's; decoder_input_ids, with the
            same keys behind "decoder_", the decoder's, or made of labels, which are not shifted.
            Of several documents in a row each reads the encoder's of its number.
        model: of parallelize_hf. Its kind says what labels are: those of a language model are
            shifted; those of a token classifier stay at their tokens; those of rows, and the
            start_positions and end_positions of answers, stay whole.
        compare_ranks, buckets: as for shard_batch.
        prepared: gives what prepare_hf_batch made of this batch, layout, model and buckets, maybe
            in a thread; None makes it here.
    Returns:
        the local batch, with labels and position_ids, and how it was sharded (of a model with an
        encoder, the decoder's tokens). Call
        `model(input_ids=..., position_ids=..., attn_metadata=sharded.attn_metadata)` and compute
        the loss by token_mean_loss: the model's own loss would shift labels inside a shard. What
        a head gives for rows is the same on all ranks of the cp group, and a loss of it as well;
        its gradients are to be summed over them.
    Raises:
        ValueError: a model without mixers, ids that it has no embedding for, padding on the left or
            in the middle, keys that contradict each other, or what shard_batch refuses.
    """
    options: dict[str, Any] = {"device": device, "compare_ranks": compare_ranks, "buckets": buckets}
    options["prepared"] = prepared
    return _shard(batch, mesh, layout, model, for_token_loss=False, **options)


@on_host
def prepare_hf_batch(
    batch: Mapping[str, Any],
    mesh: ParallelMesh,
    layout: type[SequenceLayout] = HeadTail,
    *,
    model: nn.Module,
    buckets: Buckets | None = None,
) -> PreparedBatch:
    """The part of `shard_hf_batch` that needs neither other ranks nor a device, to run in a thread.

    Args and errors are those of `shard_hf_batch`, to which the result goes as `prepared`.

    Raises:
        ValueError: also a model with an encoder, whose two batches are made when they are used.
    """
    check_kind("prepare_hf_batch", nn.Module, model=model)
    _check_one_sequence(model_with_mixers(model))
    cut = BatchCut(mesh, layout, model=model, buckets=buckets)
    return cut.prepared(_rows_of(batch, model)).hashed()


def _check_one_sequence(model: nn.Module) -> None:
    if encoder_name(model):
        raise ValueError(
            f"Batches of two sequences are made where they are used, got a "
            f"{type(model).__name__}, which has an encoder: call shard_hf_batch without prepared."
        )


def _shard(
    batch: Mapping[str, Any],
    mesh: ParallelMesh,
    layout: type[SequenceLayout],
    model: nn.Module,
    *,
    for_token_loss: bool,
    device: torch.device | str | None,
    compare_ranks: bool,
    buckets: Buckets | None,
    prepared: Callable[[], PreparedBatch] | None = None,
) -> tuple[dict[str, Tensor], ShardedBatch]:
    inside = model_with_mixers(model)
    if prepared is not None:
        _check_one_sequence(inside)
    options: dict[str, Any] = {"device": device, "compare_ranks": compare_ranks}
    if encoder_name(inside):
        check_has_mixers(model)
        return shard_two_sequences(
            batch, mesh, layout, inside, needs_labels=for_token_loss, buckets=buckets, **options
        )

    def prepared_here() -> PreparedBatch:
        cut = BatchCut(mesh, layout, model=model, buckets=buckets)
        return cut.prepared(_rows_of(batch, model, for_token_loss=for_token_loss))

    made = prepared_here if prepared is None else prepared
    local, sharded = shard_prepared(made, mesh, **options)
    images = {key: batch[key] for key in IMAGES if batch.get(key) is not None}
    metadata = agreed_on_images(sharded.attn_metadata, mesh, images=bool(images))
    sharded = replace(sharded, attn_metadata=metadata)
    if images:
        whole = {**whole_row_inputs(batch, sharded.documents, inside), **images}
        local = {key: x for key, x in local.items() if key not in (*whole, "position_ids")}
        local |= {key: x if device is None else on_device(x, device) for key, x in whole.items()}
    return local, sharded


@no_inference_tensors()
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
    over all tokens, is part of it. Without gradients nothing stays gathered for a backward pass,
    so that an optimizer may be made after an evaluation.

    Args:
        batch: as shard_hf_batch takes it, with labels.
        compare_ranks, buckets: as for shard_batch.
    Raises:
        ValueError: no labels, a model that gives outputs for rows, or what shard_hf_batch refuses.
    """
    check_kind("causal_lm_loss", nn.Module, model=model)
    check_gradients_summed(model, mesh)
    options: dict[str, Any] = {"device": device, "compare_ranks": compare_ranks, "buckets": buckets}
    local, sharded = _shard(batch, mesh, layout, model, for_token_loss=True, **options)
    labels = local.pop("labels")
    local.pop("padding_mask", None)
    balanced = {"output_router_logits": True} if is_balanced(model) else {}
    try:
        out = model(**local, attn_metadata=sharded.attn_metadata, **balanced)
        loss = token_mean_loss(out.logits, labels, global_token_count(labels, mesh.loss))
    finally:
        if not torch.is_grad_enabled():
            free_gathered(model)
    if not balanced:
        return loss
    balance = balance_weight(model) * balance_loss_of_batch(model, out.router_logits, sharded)
    # Every rank has the whole value, but only the gradient of its own tokens.
    return loss + balance - balance.detach() * (1 - 1 / mesh.size("loss"))


def _rows_of(batch: Mapping[str, Any], model: nn.Module, *, for_token_loss: bool = False) -> Rows:
    """A batch of transformers as shard_batch takes it."""
    check_batch("A batch", batch)
    rows = {key: x for key, x in batch.items() if x is not None and key not in IMAGES}
    pooled = gives_rows(model)
    if for_token_loss:
        _check_token_loss(model, rows, pooled=pooled)
    check_has_mixers(model)
    model = model_with_mixers(model)
    documents = documents_of_hf_batch(rows)
    whole = {key: x for key, x in rows.items() if key not in (*DOCUMENT_KEYS, "attention_mask")}
    whole = without_types(with_blocks(whole, model), model)
    whole["position_ids"] = documents.position_ids()
    fields = DEFAULT_FIELDS
    if pooled:
        fields = {**fields, "labels": WHOLE}
    elif "labels" in rows and getattr(model, "loss_type", None) not in LABELED_IN_PLACE:
        check_not_shifted(rows)
        whole["labels"] = shift_labels(rows["labels"], documents)
    whole = with_answers(whole, documents, model)
    if getattr(model, "loss_type", None) == "ForQuestionAnswering":
        fields = {**fields, **dict.fromkeys(ANSWER_KEYS, WHOLE)}
    unknown = [key for key in whole if key not in fields and key not in MASK_FIELDS]
    if unknown:
        raise ValueError(
            f"A batch of transformers holds what its model reads, got {unknown}: leave it out; "
            f"what a loss of your own reads is cut by ShardedBatch.shard."
        )
    of_rows = Rows.of(whole, fields, documents)
    return replace(of_rows, last_given=last_position(rows, documents))


def _check_token_loss(model: nn.Module, rows: Mapping[str, Any], *, pooled: bool) -> None:
    if pooled or getattr(model, "loss_type", None) == "ForQuestionAnswering":
        raise ValueError(
            f"A loss of tokens is computed of one output per token, got {type(model).__name__}: "
            f"call shard_hf_batch and the model, and compute the loss of its rows "
            f"(docs/transformers.md)."
        )
    check_labeled(rows)
