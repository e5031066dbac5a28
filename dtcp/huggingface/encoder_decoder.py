"""Models with an encoder and a decoder: two sequences, each with documents and a layout of its own.

    batch      input_ids [B, S], attention_mask        decoder_input_ids or labels [B, T]
    metadata   attn_metadata.memory, the encoder's     attn_metadata, the decoder's

A decoder's document reads the whole document of its number among the encoder's. A model is called
with both: the encoder takes the metadata of its own sequence out of those of the call.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.batch import BatchCut, PreparedBatch, shard_prepared
from dtcp.distributed.mesh import ParallelMesh
from dtcp.forward import wrap_forward
from dtcp.huggingface.documents import documents_of_hf_batch
from dtcp.huggingface.padding_ids import with_padding_of_ids
from dtcp.huggingface.rotary_lengths import last_position
from dtcp.labels import IGNORED
from dtcp.metadata import BatchMetadata
from dtcp.mixer_metadata import MixerKinds
from dtcp.rows import DEFAULT_FIELDS, Rows
from dtcp.sequence.arguments import check_batch, check_tensor
from dtcp.sequence.batch_documents import DOCUMENT_KEYS
from dtcp.sequence.buckets import Buckets
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout
from dtcp.sharded_batch import ShardedBatch

DECODER = "decoder_"
"""The prefix of arguments that belong to the decoder's tokens."""

TOKENS = ("input_ids", "inputs_embeds")
DECODER_TOKENS = tuple(f"{DECODER}{key}" for key in TOKENS)
_OF_TOKENS = (*TOKENS, "attention_mask", "position_ids")


def encoder_name(model: Any) -> str:
    """The name of the encoder in a model that has a decoder, too; empty in others."""
    taken = inspect.signature(type(model).forward).parameters
    if DECODER_TOKENS[0] not in taken or not hasattr(model, "get_encoder"):
        return ""
    encoder = model.get_encoder()
    return next((name for name, module in model.named_modules() if module is encoder), "")


def install_encoder(encoder: nn.Module) -> None:
    """Let an encoder read the metadata of its own sequence."""
    wrap_forward(encoder, _on_memory)


def _on_memory(encoder: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    batch = kwargs.get("attn_metadata")
    memory = batch.memory if isinstance(batch, BatchMetadata) else None
    if memory is None:
        raise ValueError(
            f"An encoder reads the metadata of its own sequence, got attn_metadata of type "
            f"{type(batch).__name__} without any for {type(encoder).__name__}: call the whole "
            f"model, with the attn_metadata of shard_hf_batch."
        )
    return forward(*args, **{**kwargs, "attn_metadata": memory})


def shard_two_sequences(
    batch: Mapping[str, Any],
    mesh: ParallelMesh,
    layout: type[SequenceLayout],
    model: Any,
    *,
    needs_labels: bool = False,
    buckets: Buckets | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], ShardedBatch]:
    """As shard_hf_batch, for a model with an encoder: the ShardedBatch is the decoder's.

    Dropouts may read either sequence, wherever they are: adapters of cross attention, of the head.
    """
    dropouts = MixerKinds.of(model).dropouts

    def encoded() -> PreparedBatch:
        cut = BatchCut(mesh, layout, model=model.get_encoder(), buckets=buckets)
        check_batch("A batch", batch)
        if needs_labels:
            check_labeled(batch)
        return replace(cut.prepared(_encoder_rows(batch, model)), dropouts=dropouts)

    memory, of_memory = shard_prepared(encoded, mesh, **options)

    def decoded() -> PreparedBatch:
        cut = BatchCut(mesh, layout, model=model.get_decoder(), buckets=buckets, memory=of_memory)
        return replace(cut.prepared(_decoder_rows(batch, model)), dropouts=dropouts)

    local, sharded = shard_prepared(decoded, mesh, **options)
    both = sharded.attn_metadata.with_memory(of_memory.attn_metadata)
    named = {key if key == "labels" else f"{DECODER}{key}": x for key, x in local.items()}
    named |= {key: x for key, x in memory.items() if key != "padding_mask"}
    named.pop(f"{DECODER}padding_mask", None)
    return named, replace(sharded, attn_metadata=both)


def check_labeled(batch: Mapping[str, Any]) -> None:
    """Refuse a batch to train on without labels."""
    if batch.get("labels") is None:
        raise ValueError(
            f"A batch to train on has labels, not shifted, got {sorted(batch)}: add them; a "
            f"language model's are its input_ids."
        )


def _encoder_rows(batch: Mapping[str, Any], model: Any) -> Rows:
    _check_keys(batch)
    inputs = {key: batch.get(key) for key in (*_OF_TOKENS, *DOCUMENT_KEYS)}
    own = {key: x for key, x in inputs.items() if x is not None}
    return _rows(with_padding_of_ids(own, model, "encoder"))


def _decoder_rows(batch: Mapping[str, Any], model: Any) -> Rows:
    inputs = {key: batch.get(f"{DECODER}{key}") for key in _OF_TOKENS}
    own = {key: x for key, x in inputs.items() if x is not None}
    labels = batch.get("labels")
    if not any(key in own for key in TOKENS):
        if labels is None:
            raise ValueError(
                f"A decoder reads tokens of its own, got a batch with {sorted(batch)}: give "
                f"labels, or decoder_input_ids."
            )
        check_tensor("A batch", shape="[B, S]", ndim=2, labels=labels)
        documents = documents_of_hf_batch({**own, "input_ids": labels})
        own["input_ids"] = _shifted_right(model, labels, documents)
    own = with_padding_of_ids(own, model, "decoder")
    return _rows(own if labels is None else {**own, "labels": labels})


def _rows(given: dict[str, Any]) -> Rows:
    documents = documents_of_hf_batch(given)
    tokens = {key: given[key] for key in (*TOKENS, "labels") if key in given}
    tokens["position_ids"] = documents.position_ids()
    rows = Rows.of(tokens, DEFAULT_FIELDS, documents)
    return replace(rows, last_given=last_position(given, documents))


def _shifted_right(model: Any, labels: Tensor, documents: Documents) -> Tensor:
    """The decoder's input ids, from labels shifted right, document by document: [B, S]."""
    shift = _own_shift(model)
    shifted = torch.zeros_like(labels)
    for row, lengths in enumerate(documents.lengths):
        first = 0
        for length in lengths:
            part = slice(first, first + length)
            shifted[row, part] = shift(labels[row : row + 1, part])[0]
            first += length
    return shifted.where(shifted != IGNORED, 0)


def _own_shift(model: Any) -> Callable[[Tensor], Tensor]:
    """How a model makes the decoder's tokens from labels: its method, or a function of its file."""
    method = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if method is not None:
        return partial(method)
    modules = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    shifts = (getattr(module, "shift_tokens_right", None) for module in modules)
    function = next((each for each in shifts if each is not None), None)
    if function is None:
        raise ValueError(
            f"A decoder reads its labels, shifted as its model does it, got labels alone for "
            f"{type(model).__name__}, which has no function for it: give decoder_input_ids."
        )
    ids = {key: getattr(model.config, key) for key in ("pad_token_id", "decoder_start_token_id")}
    return partial(function, **ids)


def _check_keys(batch: Mapping[str, Any]) -> None:
    known = (*_OF_TOKENS, *DOCUMENT_KEYS, "labels", *(f"{DECODER}{key}" for key in _OF_TOKENS))
    unknown = [key for key, x in batch.items() if key not in known and x is not None]
    if unknown:
        raise ValueError(
            f"A batch of a model with an encoder holds what belongs to its two sequences, got "
            f"{unknown}: give {list(_OF_TOKENS)}, the same behind {DECODER!r}, and labels."
        )
