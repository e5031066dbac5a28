"""The models to check: every causal and every masked language model, tiny."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A model type of transformers, and the fields that are changed in its config.

    Args:
        model_type: as --hf-config takes it.
        change: as --set takes it: dropout and noise at 0, and what makes an encoder a decoder.
    """

    model_type: str
    change: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What a person types after --hf-config."""
        changes = [f"{key}={json.dumps(value)}" for key, value in self.change.items()]
        return " ".join([self.model_type, *(["--set", *changes] if changes else [])])


def all_cases() -> list[Case]:
    """One for each model type; a second one where an encoder can be a decoder."""
    from transformers.models.auto import modeling_auto

    causal = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    masked = set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    cases = []
    for model_type in sorted(causal | masked):
        fields = _fields(model_type)
        quiet = {key: 0.0 for key, value in fields.items() if _is_noise(key, value)}
        cases.append(Case(model_type, quiet))
        is_encoder = fields.get("is_decoder") is False and not fields.get("is_encoder_decoder")
        if model_type in causal & masked and is_encoder:
            cases.append(Case(model_type, {"is_decoder": True, **quiet}))
    return cases


def _is_noise(key: str, value: Any) -> bool:
    noisy = "drop" in key or "jitter" in key
    return noisy and isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _fields(model_type: str) -> Mapping[str, Any]:
    """Of the text model, where there are several; none where transformers refuses its defaults."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(model_type)
    except StrictDataclassError:
        return {}
    return vars(config) | vars(config.get_text_config(decoder=True))
