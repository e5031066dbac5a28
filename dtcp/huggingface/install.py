"""Gives the attention modules of a transformers model their mixers."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dtcp._torch.fsdp import weights_held_by
from dtcp.forward import wrap_forward
from dtcp.huggingface import registry
from dtcp.huggingface.distance_bias import install_bias_tables
from dtcp.huggingface.encoder_decoder import DECODER, DECODER_TOKENS, TOKENS, install_encoder
from dtcp.huggingface.expert_capacity import install_capacity
from dtcp.huggingface.images import IMAGES, image_arguments, install_image_inputs
from dtcp.huggingface.latents import read_picked_latents
from dtcp.huggingface.meta_device import survey_on_meta
from dtcp.huggingface.metadata_as_mask import pass_metadata_as_mask, pass_metadata_to_base
from dtcp.huggingface.own_attention import looked_up_in, own_attentions, use_registry
from dtcp.huggingface.padding_ids import install_padding_ids
from dtcp.huggingface.pooled_head import install_pooled_head
from dtcp.huggingface.positions import (
    DECODER_KEY,
    KEY,
    Positions,
    call_with_positions,
    install_positions,
    note_longest,
)
from dtcp.huggingface.query_temperature import install_query_temperature
from dtcp.huggingface.recorder import SurveyedAttention, survey_mask
from dtcp.huggingface.recurrent_layers import OWN_MASK, install_recurrent_mixers
from dtcp.huggingface.rotary_lengths import install_rotary_lengths
from dtcp.huggingface.router_logits import leave_out_own_balance
from dtcp.huggingface.row_checks import install_row_checks
from dtcp.huggingface.row_heads import install_row_heads, install_trunk
from dtcp.huggingface.shared_prompts import let_prompts_be_shared, surveyed_with_prompts
from dtcp.huggingface.survey import Survey, survey
from dtcp.huggingface.token_dropouts import install_token_dropouts
from dtcp.huggingface.token_types import READS_TYPES, check_no_types

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
"""What a model with mixers may be called with; the last one only to switch it off."""


def survey_of(model: Any) -> Survey:
    """What `install_mixers` goes by; of a model on the meta device, by a copy with weights."""
    return survey_on_meta(model) if next(model.parameters()).is_meta else survey(model)


def install_mixers(
    model: Any, *, shared_prompts: bool = False, surveyed: Survey | None = None
) -> Survey:
    """Make a model attend by mixers, one per attention module; refuse what mixers cannot do.

    Parameters keep their names. On one device the model computes what it did before; its forward
    takes `attn_metadata`, and a plan may claim the mixers, `<name of the attention>.dtcp_mixer`.
    So does the forward of every model inside of it (`model.model`), by the same rules.

    Args:
        shared_prompts: let answers share a prompt in rows that say so (shared_prompts.py).
        surveyed: of a model that is its like, which need not be surveyed again.
    Raises:
        ValueError: the model mixes tokens in a way that cannot be sharded, or in which answers
            cannot share a prompt; names the layers.
    """
    check_has_no_mixers(model)
    before = {key: x._attn_implementation for key, x in _inner_configs(model)}
    result = surveyed or survey_of(model)
    result.check()
    if shared_prompts:
        result = surveyed_with_prompts(model, result)
        let_prompts_be_shared(model)
    for attention in result.attentions:
        _install_attention(model.get_submodule(attention.name), attention)
    for name in result.own_masks:
        vars(model.get_submodule(name))[OWN_MASK] = True
    install_recurrent_mixers(model, result.recurrent)
    install_capacity(model)
    install_bias_tables(model)
    install_query_temperature(model)
    install_rotary_lengths(model, result.positions.offset)
    install_token_dropouts(model, result.dropouts)
    for module in own_attentions(model):
        use_registry(model, module)
    _pass_metadata(model, result)
    if result.pooled_head is not None:
        install_pooled_head(model, result.pooled_head)
    install_row_heads(model, result.row_heads)
    registry.register_attention(survey_mask)
    registry.set_attention(model, registry.IMPLEMENTATION)
    _leave_others(model, result, before)
    _check_inner_calls(model, result)
    install_trunk(model, result.row_heads)
    if result.images:
        install_image_inputs(model, result.images, prompts=result.sees_prompt)
    if result.encoder:
        install_encoder(model.get_submodule(result.encoder))
    install_positions(model, result.positions)
    note_longest(model, result.positions, result.images)
    install_padding_ids(model, hidden=result.hides_padding, uncounted=result.uncounted_padding)
    install_row_checks(model, two_sequences=bool(result.encoder))
    vars(model)[_POSITIONS] = result.positions
    vars(model)[READS_TYPES] = result.reads_types
    vars(model)[_CONFIGS] = _attention_configs(model, result)
    vars(model)[_OF_DECODER] = (*DECODER_TOKENS, DECODER_KEY) if result.encoder else ()
    if hasattr(model.config.get_text_config(), "output_router_logits"):
        wrap_forward(model, leave_out_own_balance)
    wrap_forward(model, _checked_forward)
    return result


def _pass_metadata(model: Any, result: Survey) -> None:
    for name in result.givers:
        pass_metadata_as_mask(name, model.get_submodule(name))
    if result.base_unread:
        pass_metadata_to_base(model)


def _check_inner_calls(model: Any, result: Survey) -> None:
    """Make the models inside a model refuse what it refuses."""
    mixing = [each.name for each in result.attentions] + [each.name for each in result.recurrent]
    for name, module in model.named_modules():
        mixes = any(each.startswith(f"{name}.") for each in mixing)
        if name and mixes and _is_entry(module) and result.positions.taken:
            parameters = inspect.signature(type(module).forward).parameters
            vars(module)[_ARGUMENTS] = [
                key for key, x in parameters.items() if x.kind is x.POSITIONAL_OR_KEYWORD
            ]
            vars(module)[_CONFIGS] = _attention_configs(model, result)
            wrap_forward(module, _checked_inner_forward)


def _install_attention(module: nn.Module, attention: SurveyedAttention) -> None:
    module.add_module(registry.MIXER, attention.mixer())
    vars(module)[registry.FIXED] = attention.arguments
    if attention.num_selected:
        read_picked_latents(module, attention.num_selected)


def has_mixers(model: Any) -> bool:
    """Whether install_mixers has given a model its mixers."""
    return _POSITIONS in vars(model)


def model_with_mixers(model: Any) -> Any:
    """The model that has its mixers: this one, or the one inside a wrapper, as of peft.

    A wrapper takes any argument and passes it on, so it does not show what the model is.
    """
    if has_mixers(model):
        return model
    return next((module for module in model.modules() if has_mixers(module)), model)


def check_has_no_mixers(model: Any) -> None:
    """Refuse a model that has its mixers already.

    Raises:
        ValueError: as above.
    """
    if has_mixers(model):
        raise ValueError(
            f"A model is given its mixers once, got a {type(model).__name__} that has them: use it "
            f"as it is, or build another one for another mesh."
        )


def check_has_mixers(model: nn.Module) -> None:
    """Refuse a model without mixers: tokens would only see those of their own shard.

    And weights that were added to it, or around it, after it was sharded: each rank would only
    have the gradients of its own tokens.

    Args:
        model: itself, or what holds it, as of peft.
    Raises:
        ValueError: as above.
    """
    if not any(has_mixers(module) for module in model.modules()):
        raise ValueError(
            f"A batch is cut for a model that knows of its shards, got a {type(model).__name__} "
            f"as transformers builds it: call parallelize_hf(model, mesh) first."
        )
    if not isinstance(model_with_mixers(model), FSDPModule):
        return  # weights that no unit holds are somebody else's to sum
    # Listed first: a step that runs beside this thread may gather a weight at any time.
    trained = [(name, x) for name, x in model.named_parameters() if x.requires_grad]
    plain = [(name, x) for name, x in trained if not isinstance(x, DTensor)]
    if not plain:
        return
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    held = {id(x) for unit in sharded for x in weights_held_by(unit)}
    for name, parameter in plain:
        if id(parameter) not in held:
            raise ValueError(
                f"Weights that are trained are shards of their mesh, got {name} of a "
                f"{type(model).__name__} that was sharded before it had this weight: call "
                f"parallelize_hf on the whole, with all its layers and adapters."
            )


def _attention_configs(model: Any, result: Survey) -> list[Any]:
    """The configs whose implementation names choose the attention function."""
    modules = [model.get_submodule(each.name) for each in result.attentions]
    configs = [looked_up_in(module) for module in modules]
    return list({id(config): config for config in configs if config is not None}.values())


_POSITIONS, _ARGUMENTS = "dtcp_positions_rule", "dtcp_arguments"
_CONFIGS = "dtcp_attention_configs"
_OF_DECODER = "dtcp_decoder_arguments"


def _inner_configs(model: Any) -> list[tuple[str, Any]]:
    keys = getattr(model.config, "sub_configs", {})
    configs = [(key, getattr(model.config, key, None)) for key in keys]
    return [(key, config) for key, config in configs if config is not None]


def _leave_others(model: Any, result: Survey, before: Mapping[str, str]) -> None:
    """Restore the attention of what was not surveyed: a vision tower, whose images are whole."""
    modules = [model.get_submodule(each.name) for each in result.attentions]
    surveyed = [getattr(module, "config", None) for module in modules]
    for key, config in _inner_configs(model):
        if None not in surveyed and not any(config is each for each in surveyed):
            config._attn_implementation = before[key]


def _is_entry(module: nn.Module) -> bool:
    """Whether a module is a model that may be called instead of the one it is part of."""
    from transformers import PreTrainedModel

    has_positions = "position_ids" in inspect.signature(module.forward).parameters
    return isinstance(module, PreTrainedModel) and has_positions


def _checked_forward(model: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kwargs = _without_padding_mask(kwargs)
    _check_call(model, args, kwargs)
    _check_implementation(model, vars(model)[_CONFIGS])
    positions: Positions = vars(model)[_POSITIONS]
    return call_with_positions(model, positions, forward, **{**kwargs, "use_cache": False})


def _without_padding_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments without the mask that shard_hf_batch gives for losses: the metadata say the same.

    Raises:
        ValueError: a mask of other tokens, whose values are read on hosts and outside of graphs.
    """
    mask = kwargs.get("padding_mask")
    real = getattr(kwargs.get("attn_metadata"), "real", None)
    if not isinstance(mask, Tensor) or real is None:
        return kwargs
    same = mask.shape == real.shape
    if same and mask.device.type == "cpu" and not torch.compiler.is_compiling():
        same = torch.equal(mask.bool(), ~real.cpu())
    if not same:
        raise ValueError(
            f"A model with mixers hides the padding that its metadata were made of, got another "
            f"padding_mask, of shape {tuple(mask.shape)} for tokens {tuple(real.shape)}: pass the "
            f"one that shard_hf_batch gave with the metadata, or none."
        )
    return {key: x for key, x in kwargs.items() if key != "padding_mask"}


def _checked_inner_forward(
    module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    # Models call inner ones with positional arguments, too, and with more than users may; what
    # would be silently wrong is the same.
    names = getattr(module, _ARGUMENTS)
    _check_implementation(module, getattr(module, _CONFIGS))
    _check_inputs({**dict(zip(names[1:], args, strict=False)), **kwargs})
    return forward(*args, **kwargs)


def _check_implementation(model: Any, configs: list[Any]) -> None:
    """Refuse attention that was switched to another implementation: it would only see shards."""
    for config in configs:
        chosen = config._attn_implementation
        if chosen != registry.IMPLEMENTATION:
            raise ValueError(
                f"Tokens of shards meet in mixers, got a {type(model).__name__} whose attention "
                f"was set to {chosen!r} after them: leave set_attn_implementation out; a kernel "
                f"of attention is chosen by dtcp.softmax.mixer.name_kernel."
            )


def _check_call(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if args:
        raise TypeError(
            f"A model with mixers is called by keywords, got {len(args)} positional arguments: "
            f"pass input_ids=, position_ids= and attn_metadata=."
        )
    switched_on = [key for key in ARGUMENTS[-1:] if kwargs.get(key)]
    known = (*ARGUMENTS, *image_arguments(model), *vars(model)[_OF_DECODER])
    unknown = [key for key, x in kwargs.items() if key not in known and x is not None]
    check_no_types(model, kwargs)
    if switched_on or unknown or kwargs.get("use_cache"):
        raise ValueError(
            f"A model with mixers is called with the input_ids, position_ids and attn_metadata of "
            f"shard_hf_batch, got with={unknown + switched_on}, use_cache="
            f"{kwargs.get('use_cache')}: labels go to token_mean_loss, masks to shard_hf_batch, "
            f"the rest to a loss of your own; a cache (as generate has one) and attention weights "
            f"have no sharded form."
        )
    _check_inputs(kwargs)
    if vars(model)[_OF_DECODER]:
        own = {key: kwargs.get(f"{DECODER}{key}") for key in (*TOKENS, KEY)}
        _check_inputs({**own, "attn_metadata": kwargs["attn_metadata"]})


def _check_inputs(inputs: Mapping[str, Any]) -> None:
    missing = [key for key in ("position_ids", "attn_metadata") if inputs.get(key) is None]
    has_images = any(inputs.get(key) is not None for key in IMAGES)
    if missing and not (has_images and missing == ["position_ids"]):
        raise ValueError(
            f"A model with mixers is called with the position_ids and attn_metadata of "
            f"shard_hf_batch, got without={missing}: pass both, for it would count its shard from "
            f"0; to generate, save the model and load it without a mesh."
        )
    mask = inputs.get("attention_mask")
    # Models hand the ones inside of them a mask for each kind of layer, and none here.
    masks = mask.values() if isinstance(mask, Mapping) else [mask]
    if any(each is not None for each in masks):
        raise ValueError(
            f"Padding of a sharded batch is in its metadata, got an attention_mask of shape "
            f"{tuple(getattr(mask, 'shape', ()))}: give it to shard_hf_batch, not to the model."
        )
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    position_ids = inputs.get("position_ids")
    if (
        tokens is not None
        and position_ids is not None
        and position_ids.shape[-1] != tokens.shape[1]
    ):
        raise ValueError(
            f"A model has one position for each token of its shard, got position_ids.shape="
            f"{tuple(position_ids.shape)} for tokens of {tuple(tokens.shape[:2])}: pass the "
            f"position_ids of shard_hf_batch."
        )
