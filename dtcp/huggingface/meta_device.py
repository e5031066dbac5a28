"""Survey a model on the meta device by a narrow copy: as deep, with the same kinds of layers."""

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
    "d_ff": 16,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "decoder_vocab_size": 64,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "n_group": 1,
    "topk_group": 1,
}
"""Sizes that neither masks nor scales depend on. Scales depend on the width of heads: it stays."""

HEADS = 2


def survey_on_meta(model: Any) -> Survey:
    """What `survey` would find in a model that is still on the meta device.

    Raises:
        ValueError: the model has several modalities, or its narrow copy does not resemble it.
    """
    result = survey(_narrow_copy(model))
    modules = dict(model.named_modules())
    for attention in result.attentions:
        module = modules.get(attention.name)
        scale = getattr(module, "scaling", attention.scale)
        if module is None or scale != attention.scale:
            raise ValueError(
                f"A model on the meta device is surveyed by a narrow copy made from its config, "
                f"got {attention.name} with scale={attention.scale} in the copy and {scale} in the "
                f"model: build it on a real device."
            )
    return result


def _narrow_copy(model: Any) -> Any:
    config = deepcopy(model.config)
    if config.sub_configs:
        raise ValueError(
            f"A model on the meta device has one modality, got {type(model).__name__} of "
            f"{list(config.sub_configs)}: build it on a real device, or build its text model."
        )
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    narrow = {key: size for key, size in NARROW.items() if getattr(config, key, None)}
    narrow |= {"hidden_size": HEADS * head_dim, "num_attention_heads": HEADS}
    padding = getattr(config, "pad_token_id", None)
    # Some models count positions from behind it.
    narrow["pad_token_id"] = padding if padding and padding < NARROW["vocab_size"] else 0
    if kv_heads:
        narrow["num_key_value_heads"] = HEADS if kv_heads == heads else 1
    for key, size in narrow.items():
        setattr(config, key, size)
    return type(model)._from_config(config).train(model.training)
