"""Give the attention modules of a model of transformers their mixers."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dtcp.forward import wrap_forward
from dtcp.huggingface import registry
from dtcp.huggingface.meta_device import survey_on_meta
from dtcp.huggingface.pooled_head import install_pooled_head
from dtcp.huggingface.router_logits import leave_out_own_balance
from dtcp.huggingface.survey import Survey, survey, survey_mask

ARGUMENTS = (
    "input_ids",
    "inputs_embeds",
    "position_ids",
    "attn_metadata",
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "output_router_logits",
    "output_attentions",
)
"""What a model with mixers may be called with; the last one only to switch something off."""


def install_mixers(model: Any) -> Survey:
    """Let a model attend by mixers, one in each attention module; refuse what mixers cannot do.

    Parameters keep their names. On one device the model computes what it did before; its forward
    takes `attn_metadata`, and a plan may claim the mixers, `<name of the attention>.dtcp_mixer`.
    So does the forward of every model inside of it (`model.model`), by the same rules.

    Raises:
        ValueError: the model mixes tokens in a way that cannot be sharded; names the layers.
    """
    on_meta = next(model.parameters()).is_meta
    result = survey_on_meta(model) if on_meta else survey(model)
    result.check()
    for attention in result.attentions:
        model.get_submodule(attention.name).add_module(registry.MIXER, attention.mixer())
    if result.pooled_head is not None:
        install_pooled_head(model, result.pooled_head)
    registry.register_attention(survey_mask)
    registry.set_attention(model, registry.IMPLEMENTATION)
    for module in model.modules():
        if module is not model and _is_entry(module):
            wrap_forward(module, _checked_inner_forward)
    if hasattr(model.config.get_text_config(), "output_router_logits"):
        wrap_forward(model, leave_out_own_balance)
    wrap_forward(model, _checked_forward)
    return result


def _is_entry(module: nn.Module) -> bool:
    """Whether a module is a model that may be called in the place of the one it is part of."""
    from transformers import PreTrainedModel

    has_positions = "position_ids" in inspect.signature(module.forward).parameters
    return isinstance(module, PreTrainedModel) and has_positions


def _checked_forward(_: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _check_call(args, kwargs)
    return forward(**{**kwargs, "use_cache": False})


def _checked_inner_forward(
    module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    # Models call the ones inside of them with positional arguments, too, and with more than users
    # may; what would be wrong without a word is the same.
    signature = inspect.signature(type(module).forward)
    names = [name for name, x in signature.parameters.items() if x.kind is x.POSITIONAL_OR_KEYWORD]
    _check_inputs({**dict(zip(names[1:], args, strict=False)), **kwargs})
    return forward(*args, **kwargs)


def _check_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if args:
        raise TypeError(
            f"A model with mixers is called by keywords, got {len(args)} positional arguments: "
            f"pass input_ids=, position_ids= and attn_metadata=."
        )
    switched_on = [key for key in ARGUMENTS[-1:] if kwargs.get(key)]
    unknown = [key for key, x in kwargs.items() if key not in ARGUMENTS and x is not None]
    if switched_on or unknown or kwargs.get("use_cache"):
        raise ValueError(
            f"A model with mixers is called with the input_ids, position_ids and attn_metadata of "
            f"shard_hf_batch, got with={unknown + switched_on}, use_cache="
            f"{kwargs.get('use_cache')}: labels go to token_mean_loss, masks to shard_hf_batch; a "
            f"cache (as generate has one) and attention weights have no sharded form."
        )
    _check_inputs(kwargs)


def _check_inputs(inputs: Mapping[str, Any]) -> None:
    missing = [key for key in ("position_ids", "attn_metadata") if inputs.get(key) is None]
    if missing:
        raise ValueError(
            f"A model with mixers is called with the position_ids and attn_metadata of "
            f"shard_hf_batch, got without={missing}: it would count its shard from 0."
        )
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    position_ids = inputs["position_ids"]
    if tokens is not None and position_ids.shape[-1] != tokens.shape[1]:
        raise ValueError(
            f"A model has one position for each token of its shard, got position_ids.shape="
            f"{tuple(position_ids.shape)} for tokens of {tuple(tokens.shape[:2])}: pass the "
            f"position_ids of shard_hf_batch."
        )
