"""transformers' attention registry: how a model that calls attention by name calls a mixer.

A model asks the registry for `config._attn_implementation` and calls what it finds with the
attention module first; so the mixer is a submodule of that module, and nothing is process-wide
but two names. The tables of a batch come down from the model's own call, as a keyword argument
that transformers hands on.
"""

from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtcp.metadata import BatchMetadata

IMPLEMENTATION = "dtcp"
"""What `config._attn_implementation` says of a model whose attention is ours."""

SURVEY = "dtcp_survey"
"""The same while a model is looked at."""

MIXER = "dtcp_mixer"
"""The mixer's name in its attention module."""


class Recorder(Protocol):
    """Who is told of attention calls during a survey; comes in the place of the tables."""

    def record(
        self, module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], mask: Any, how: dict[str, Any]
    ) -> Tensor: ...


def register(survey_mask: Any) -> None:
    """Tell transformers of both implementations. Twice is once."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionInterface.register(SURVEY, _tell)
    # Registered too: for a name without a mask function, masks are dropped without a word.
    AttentionMaskInterface.register(IMPLEMENTATION, no_mask)
    AttentionMaskInterface.register(SURVEY, survey_mask)


def use(model: Any, implementation: str) -> None:
    """Make a model call an implementation of attention.

    Raises:
        ValueError: the model does not ask the registry.
    """
    model.set_attn_implementation(implementation)
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        asked = getattr(config, "_attn_implementation", implementation)
        if asked != implementation:
            raise ValueError(
                f"A model of transformers takes its attention from the attention registry, got "
                f"{name or type(model).__name__} ({type(module).__name__}), which keeps "
                f"{asked!r}: write its attention with a mixer (docs/add_a_model.md)."
            )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    attn_metadata: BatchMetadata | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend by the module's mixer: what the survey has read, of mask and scale, is in it.

    Args:
        query, key, value: [B, H or G, L, D].
        s_aux: [H], the sinks.
    Returns:
        [B, L, H, V].
    """
    if dropout or attention_mask is not None or attn_metadata is None:
        raise ValueError(
            f"{describe(module)} attends by the tables of its batch alone, got dropout={dropout}, "
            f"attention_mask={attention_mask}, tables={attn_metadata}: pass tables=plan.tables of "
            f"shard_hf_batch, no mask, and set the attention dropout of the config to 0."
        )
    if isinstance(s_aux, DTensor):
        # Sharded with the heads: each rank's own.
        s_aux = s_aux.to_local(grad_placements=s_aux.placements)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return module.get_submodule(MIXER)(q, k, v, attn_metadata, sink=s_aux), None


def no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """The mask of a model whose mixers know what they see: none, of any size."""
    if attention_mask is not None:
        raise ValueError(
            f"Padding of a sharded batch is in its tables, got an attention_mask of shape "
            f"{tuple(attention_mask.shape)}: give it to shard_hf_batch, not to the model."
        )


def describe(module: nn.Module) -> str:
    """A layer, as far as it knows itself."""
    index = getattr(module, "layer_idx", None)
    return type(module).__name__ if index is None else f"{type(module).__name__} of layer {index}"


def _tell(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    attn_metadata: Recorder | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    if attn_metadata is None:
        raise ValueError(
            f"A model hands keyword arguments of its call on to its attention, got "
            f"{describe(module)}, which receives none: write its attention with a mixer "
            f"(docs/add_a_model.md)."
        )
    return attn_metadata.record(module, (query, key, value), attention_mask, how), None
