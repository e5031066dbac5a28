"""The models to check: every causal, masked and image-reading language model, tiny."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SPEECH = {
    *("audioflamingo3", "glmasr", "granite_speech", "granite_speech_plus", "musicflamingo"),
    *("moss_transcribe_diarize", "nemo_speechlm", "omniasr", "qwen2_audio", "qwen3_asr"),
    *("seamless_m4t", "seamless_m4t_v2", "vibevoice_asr", "voxtral", "voxtral_realtime"),
}
"""Model types that read speech."""


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
    """One for each model type; a second one where an encoder can be a decoder.

    And where a model of encoder and decoder can be a decoder alone.
    """
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    causal = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    masked = set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    both = set(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES) - SPEECH
    images = set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) & set(CONFIG_MAPPING)
    cases = []
    for model_type in sorted(causal | masked | both | images):
        fields = _fields(model_type)
        quiet = {key: 0.0 for key, value in fields.items() if _is_noise(key, value)}
        cases.append(Case(model_type, quiet))
        if model_type in both and model_type in causal | masked:
            cases.append(Case(model_type, {"is_encoder_decoder": False, **quiet}))
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
    if getattr(config, "is_encoder_decoder", False):
        # Its text config has other names for the fields of the decoder.
        return vars(config)
    return vars(config) | vars(config.get_text_config(decoder=True))
