"""A model that has no memory yet is surveyed by a twin: as deep, of the same kinds, but narrow."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from dtcp.huggingface.survey import Survey, survey

NARROW: Mapping[str, int] = {
    "vocab_size": 64,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 2,
    "num_local_experts": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
}
"""Sizes that neither masks nor scales depend on. Heads keep their width, for scales do."""

HEADS = 2


def survey_unbuilt(model: Any) -> Survey:
    """What `survey` would find in a model on the meta device.

    Raises:
        ValueError: a twin that does not resemble the model.
    """
    found = survey(_twin(model))
    for each in found.attentions:
        module = dict(model.named_modules()).get(each.name)
        scale = getattr(module, "scaling", each.scale)
        if module is None or scale != each.scale:
            raise ValueError(
                f"A model on the meta device is surveyed by a narrow twin of its config, got "
                f"{each.name} with scale={each.scale} in the twin and {scale} in the model: build "
                f"it on a real device."
            )
    return found


def _twin(model: Any) -> Any:
    config = deepcopy(model.config)
    if config.sub_configs:
        raise ValueError(
            f"A model on the meta device is a text model alone, got {type(model).__name__} of "
            f"{list(config.sub_configs)}: build it on a real device, or its text model."
        )
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    narrow = {key: size for key, size in NARROW.items() if getattr(config, key, None)}
    narrow |= {"hidden_size": HEADS * head_dim, "num_attention_heads": HEADS, "pad_token_id": 0}
    if kv_heads:
        narrow["num_key_value_heads"] = HEADS if kv_heads == heads else 1
    for key, size in narrow.items():
        setattr(config, key, size)
    return type(model)._from_config(config).train(model.training)
