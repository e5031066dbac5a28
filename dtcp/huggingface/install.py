"""Give the attention modules of a model of transformers their mixers."""

from collections.abc import Mapping
from functools import wraps
from typing import Any

from dtcp.huggingface import registry
from dtcp.huggingface.meta_device import survey_unbuilt
from dtcp.huggingface.survey import Survey, survey, survey_mask

TAKEN = (
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
"""What a model with mixers may be called with; the last two only to switch them off."""


def install_mixers(model: Any) -> Survey:
    """Make a model attend by mixers, one in each attention module, and refuse what they cannot.

    Parameters keep their names. On one device the model computes what it did; it is called with
    `attn_metadata`, and a plan may then claim the mixers: `<name of the attention>.dtcp_mixer`.

    Raises:
        ValueError: what nobody can carry out, by the names of the layers.
    """
    unbuilt = next(model.parameters()).is_meta
    found = survey_unbuilt(model) if unbuilt else survey(model)
    found.check()
    for attention in found.attentions:
        model.get_submodule(attention.name).add_module(registry.MIXER, attention.mixer())
    registry.register(survey_mask)
    registry.use(model, registry.IMPLEMENTATION)
    forward = model.forward

    @wraps(forward)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_call(args, kwargs)
        return forward(**{**kwargs, "use_cache": False})

    model.forward = checked
    return found


def _check_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if args:
        raise TypeError(
            f"A model with mixers is called by keywords, got {len(args)} positional arguments: "
            f"pass input_ids=, position_ids= and tables=."
        )
    off = [key for key in ("position_ids", "attn_metadata") if kwargs.get(key) is None]
    on = [key for key in TAKEN[-2:] if kwargs.get(key)]
    other = [key for key, x in kwargs.items() if key not in TAKEN and x is not None]
    if off or on or other or kwargs.get("use_cache"):
        raise ValueError(
            f"A model with mixers is called with input_ids, position_ids and tables of "
            f"shard_hf_batch, got without={off}, with={other + on}, "
            f"use_cache={kwargs.get('use_cache')}: labels go to token_mean_loss, masks to "
            f"shard_hf_batch; a cache, attention weights and balance losses have no sharded form."
        )
