"""transformers' attention registry: how a model that calls attention by name calls a mixer.

A model looks up `config._attn_implementation` in the registry and calls the function it finds
there with the attention module first; so the mixer is a submodule of that module, and nothing is
process-wide but two names. The metadata of a batch comes down from the model's own call, as a
keyword argument that transformers hands on.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtcp.autocast import as_autocast_casts
from dtcp.huggingface.block_attention import PickedBlocks
from dtcp.huggingface.compressed_attention import Compressed, attend_beside_entries
from dtcp.huggingface.metadata_as_mask import metadata_of_config
from dtcp.huggingface.own_attention import implementations
from dtcp.huggingface.query_temperature import tempered
from dtcp.huggingface.recurrent_layers import OWN_MASK
from dtcp.huggingface.relative_attention import RelativeBias
from dtcp.metadata import BatchMetadata
from dtcp.softmax.latent import LatentMixer
from dtcp.sparse.mixer import CompressedSparseAttention
from dtcp.sparse_blocks import SparseBlockAttention
from dtcp.sparse_latent import SparseLatentAttention

IMPLEMENTATION = "dtcp"
"""The `config._attn_implementation` of a model that attends by mixers."""

SURVEY_IMPLEMENTATION = "dtcp_survey"
"""The same while a model is surveyed."""

MIXER = "dtcp_mixer"
"""The mixer's name in its attention module."""

FIXED = "dtcp_fixed_arguments"
"""Set on an attention module: the arguments of its attention calls that every batch shares."""

PROJECTION = "kv_b_proj"
"""The projection from latents to keys and values, in modules that have latents."""
RECORDER = "dtcp_recorder"
"""The attribute of a mask with the survey's recorder, where nothing but a mask is passed on."""


class UnreadAttentionError(ValueError):
    """A model's attention cannot be surveyed: none of the model's keyword arguments reach it."""


class AttentionNotes(Protocol):
    """Records the attention calls of a survey; passed in place of the metadata."""

    def record(
        self,
        module: nn.Module,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Any,
        arguments: dict[str, Any],
    ) -> Tensor: ...

    def note_unread(self, module: nn.Module) -> None: ...


def register_attention(survey_mask: Any) -> None:
    """Register both implementations with transformers, however often it is called."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, mixer_attention_forward)
    AttentionInterface.register(SURVEY_IMPLEMENTATION, _survey_attention_forward)
    # Registered too: for a name without a mask function, masks are silently dropped.
    AttentionMaskInterface.register(IMPLEMENTATION, no_mask)
    AttentionMaskInterface.register(SURVEY_IMPLEMENTATION, survey_mask)


def set_attention(model: Any, implementation: str) -> None:
    """Choose the implementation of attention that a model calls.

    Raises:
        ValueError: the model does not look its attention up in the registry.
    """
    model.set_attn_implementation(implementation)
    for each in implementations(model):
        each._attn_implementation = implementation
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        chosen = getattr(config, "_attn_implementation", implementation)
        # Rotary tables, for one, keep a config of their own; they have no weights and attend to
        # nothing.
        if chosen != implementation and next(module.parameters(), None) is not None:
            raise ValueError(
                f"A model of transformers takes its attention from the attention registry, got "
                f"{name or type(model).__name__} ({type(module).__name__}), which keeps "
                f"{chosen!r}: write its attention with a mixer (docs/add_a_model.md)."
            )


def mixer_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BatchMetadata | None,
    *,
    dropout: float = 0.0,
    attn_metadata: BatchMetadata | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    slope: Tensor | None = None,
    selected: Tensor | None = None,
    compressed: Compressed | None = None,
    block_indices: PickedBlocks | None = None,
    relative_bias: RelativeBias | None = None,
    query_positions: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attend by the module's mixer, which has the mask and the scale that the survey read.

    Args:
        query, key, value: [B, H or G, L, D].
        attention_mask: none, or the metadata in its place.
        s_aux: [H], the sinks, or of each query [B, L, H].
        position_bias: [H, 2 R + 1], by distance (distance_bias.py).
        slope: [H], ALiBi's (own_attention.py).
        selected: [B, L, k], the tokens that queries read (picking_attention.py).
        compressed: what is read beside a window of keys (compressed_attention.py).
        block_indices: by what blocks of tokens are picked that are read (block_attention.py).
        relative_bias: what queries add to scores by distance (relative_attention.py).
        query_positions: [B or 1, L], what queries are scaled by (query_temperature.py).
    Returns:
        [B, L, H, V].
    Raises:
        ValueError: dropout, a mask, no metadata, or another scale or window than the survey read.
    """
    attn_metadata = _metadata_alone(module, attention_mask, attn_metadata, dropout)
    _check_fixed(module, arguments)
    query = query if query_positions is None else tempered(module, query, query_positions)
    # Norms and rotary tables give fp32 under autocast.
    q, k, v = (x.transpose(1, 2) for x in as_autocast_casts(query, key, value))
    sink = None if s_aux is None else _of_own_heads(s_aux if s_aux.ndim == 1 else s_aux.to(q.dtype))
    mixer = module.get_submodule(MIXER)
    if isinstance(mixer, LatentMixer):
        if mixer.wide:
            # Gradients of latents are summed in the dtype that they have.
            k, v = (x.transpose(1, 2) for x in (key, value))
        return _attend_to_latents(module, mixer, (q, k, v), selected, sink, attn_metadata), None
    if isinstance(mixer, CompressedSparseAttention):
        assert compressed is not None
        return attend_beside_entries(mixer, q, k[:, :, 0], sink, compressed, attn_metadata), None
    if isinstance(mixer, SparseBlockAttention):
        assert block_indices is not None
        return mixer(q, k, v, block_indices.picked_by, attn_metadata), None
    bias = {"bias": position_bias, "slope": slope, **_relative(relative_bias, q.dtype)}
    return mixer(q, k, v, attn_metadata, sink=sink, **bias), None


def fixed_arguments(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of an attention call that determine scores and masks."""
    return tuple(arguments.get(name) for name in ("scaling", "softcap", "sliding_window"))


def _check_fixed(module: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Refuse a module that was changed after its survey: its mixer would not follow."""
    given, surveyed = fixed_arguments(arguments), getattr(module, FIXED)
    if given != surveyed:
        raise ValueError(
            f"{layer_label(module)} attends as it did when its model was surveyed, got scaling, "
            f"softcap and sliding_window of {given} where they were {surveyed}: change a model "
            f"before parallelize_hf."
        )


def _attend_to_latents(
    module: nn.Module,
    mixer: LatentMixer,
    qkv: tuple[Tensor, Tensor, Tensor],
    selected: Tensor | None,
    sink: Tensor | None,
    attn_metadata: BatchMetadata,
) -> Tensor:
    """[B, L, H, V], of latents and rotary keys in the places of keys and values (latents.py)."""
    q, k, v = qkv
    operands = q, k[:, :, 0], v[:, :, 0], _up_projection(module, q)
    if isinstance(mixer, SparseLatentAttention):
        return mixer(*operands, selected, attn_metadata, sink=sink)
    return mixer(*operands, attn_metadata)


def _metadata_alone(
    module: nn.Module,
    attention_mask: Tensor | BatchMetadata | None,
    attn_metadata: BatchMetadata | None,
    dropout: float,
) -> BatchMetadata:
    """The metadata of a call, which may have no other mask."""
    if isinstance(attention_mask, BatchMetadata):
        # A layer above only passes on a mask (`metadata_as_mask`).
        attn_metadata, attention_mask = attention_mask, None
    if getattr(module, OWN_MASK, False):
        attention_mask = None
    if dropout or attention_mask is not None or attn_metadata is None:
        raise ValueError(_not_by_metadata_alone(module, dropout, attention_mask, attn_metadata))
    return attn_metadata


def _not_by_metadata_alone(
    module: nn.Module, dropout: float, attention_mask: Tensor | None, attn_metadata: Any
) -> str:
    mask = None if attention_mask is None else tuple(attention_mask.shape)
    return (
        f"{layer_label(module)} attends by the metadata of its batch alone, got "
        f"dropout={dropout}, attention_mask of shape {mask}, attn_metadata of type "
        f"{type(attn_metadata).__name__}: pass attn_metadata=sharded.attn_metadata of "
        f"shard_hf_batch, no mask, and set the attention dropout of the config to 0.0."
    )


def _up_projection(module: nn.Module, q: Tensor) -> Tensor:
    """The weight that makes keys and values of q's heads from latents: [H, N + V, C]."""
    projection: Any = module.get_submodule(PROJECTION)
    weight = _of_own_heads(projection.weight)
    return weight.to(q.dtype).unflatten(0, (q.shape[2], -1))


def _relative(bias: RelativeBias | None, dtype: torch.dtype) -> dict[str, Tensor]:
    return {} if bias is None else {"relative": bias.relative.to(dtype), "profiles": bias.profiles}


def _of_own_heads(x: Tensor) -> Tensor:
    """The part of a tensor, sharded by heads over tp, that belongs to this rank's heads."""
    return x.to_local(grad_placements=x.placements) if isinstance(x, DTensor) else x


def no_mask(*_: Any, config: Any = None, **__: Any) -> Any:
    """Make no mask, of whatever size: mixers know what their tokens see.

    Where layers are handed nothing but a mask, it is the metadata of the batch.

    A mask of the model's own making is all ones, as the survey made sure; a user's is refused when
    the model is called.
    """
    return metadata_of_config(config)


def layer_label(module: nn.Module) -> str:
    """The class of a layer and, if it knows it, its index."""
    index = getattr(module, "layer_idx", None)
    return type(module).__name__ if index is None else f"{type(module).__name__} of layer {index}"


def _survey_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    attn_metadata: AttentionNotes | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    if attn_metadata is None:
        attn_metadata = getattr(attention_mask, RECORDER, None)
        if attn_metadata is not None:
            attn_metadata.note_unread(module)
    if attn_metadata is None:
        raise UnreadAttentionError(
            f"A model hands keyword arguments of its call on to its attention, got "
            f"{layer_label(module)}, which receives none: write its attention with a mixer "
            f"(docs/add_a_model.md)."
        )
    return attn_metadata.record(module, (query, key, value), attention_mask, arguments), None
