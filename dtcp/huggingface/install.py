"""Give the attention modules of a model of transformers their mixers."""

from collections.abc import Callable, Mapping
from typing import Any

from dtcp.forward import wrap_forward
from dtcp.huggingface import registry
from dtcp.huggingface.meta_device import survey_on_meta
from dtcp.huggingface.survey import Survey, survey, survey_mask

ARGUMENTS = (
    "input_ids",
    "inputs_embeds",
    "position_ids",
    "attn_metadata",
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "output_router_logits",
)
"""What a model with mixers may be called with; the last two only to switch something off."""


def install_mixers(model: Any) -> Survey:
    """Let a model attend by mixers, one in each attention module; refuse what mixers cannot do.

    Parameters keep their names. On one device the model computes what it did before; its forward
    takes `attn_metadata`, and a plan may claim the mixers, `<name of the attention>.dtcp_mixer`.

    Raises:
        ValueError: the model mixes tokens in a way that cannot be sharded; names the layers.
    """
    on_meta = next(model.parameters()).is_meta
    result = survey_on_meta(model) if on_meta else survey(model)
    result.check()
    for attention in result.attentions:
        model.get_submodule(attention.name).add_module(registry.MIXER, attention.mixer())
    registry.register_attention(survey_mask)
    registry.set_attention(model, registry.IMPLEMENTATION)
    wrap_forward(model, _checked_forward)
    return result


def _checked_forward(_: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _check_call(args, kwargs)
    return forward(**{**kwargs, "use_cache": False})


def _check_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if args:
        raise TypeError(
            f"A model with mixers is called by keywords, got {len(args)} positional arguments: "
            f"pass input_ids=, position_ids= and attn_metadata=."
        )
    missing = [key for key in ("position_ids", "attn_metadata") if kwargs.get(key) is None]
    switched_on = [key for key in ARGUMENTS[-2:] if kwargs.get(key)]
    unknown = [key for key, x in kwargs.items() if key not in ARGUMENTS and x is not None]
    if missing or switched_on or unknown or kwargs.get("use_cache"):
        raise ValueError(
            f"A model with mixers is called with the input_ids, position_ids and attn_metadata of "
            f"shard_hf_batch, got without={missing}, with={unknown + switched_on}, "
            f"use_cache={kwargs.get('use_cache')}: labels go to token_mean_loss, masks to "
            f"shard_hf_batch; a cache, attention weights and balance losses have no sharded form."
        )
