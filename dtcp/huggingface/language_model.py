"""The language model that transformers has for a config, on any machine."""

from typing import Any

import torch

from dtcp.huggingface.config_fields import CORRECT
from dtcp.huggingface.own_errors import own_errors
from dtcp.huggingface.plain_torch import without_gpu_kernels


def model_of(config: Any, remedy: str = CORRECT) -> Any:
    """A language model of a config, with fresh weights.

    Causal; masked, if it is an encoder's; of two sequences, if it is that of encoder and decoder;
    one that reads images beside text, if there is no other.

    Args:
        remedy: what to do where transformers builds none of it.
    Raises:
        ValueError: transformers has none of them for it.
    """
    kind = _kind_of(config, remedy)
    did = f"transformers builds a model of {config.model_type!r}"
    with own_errors(did, remedy), without_gpu_kernels():
        return kind.from_config(config)


def is_causal(config: Any, remedy: str = CORRECT) -> bool:
    """Whether the language model of a config is a causal one; raises as model_of."""
    from transformers.models.auto import modeling_auto

    return _kind_of(config, remedy) is modeling_auto.AutoModelForCausalLM


def _kind_of(config: Any, remedy: str) -> Any:
    """The class of transformers that builds the language model of a config."""
    from transformers.models.auto import modeling_auto

    kinds: list[tuple[Any, Any]] = [
        (modeling_auto.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING),
        (modeling_auto.AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING),
    ]
    two = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if getattr(config, "is_encoder_decoder", False):
        kinds.insert(0, (modeling_auto.AutoModelForSeq2SeqLM, two))
    elif type(config) not in two and not getattr(config, "is_decoder", False):
        kinds.reverse()
    kinds.append((modeling_auto.AutoModelForImageTextToText, images))
    for kind, models in kinds:
        if type(config) in models:
            return kind
    raise ValueError(
        f"A model type has a causal, masked or encoder-decoder language model, or one that reads "
        f"images, got {config.model_type!r} without one in transformers: {remedy}."
    )


def parameter_count(config: Any, remedy: str = CORRECT) -> int:
    """Parameters of a config's language model, without making them; raises as model_of."""
    with torch.device("meta"):
        model = model_of(config, remedy)
    return sum(p.numel() for p in model.parameters())
