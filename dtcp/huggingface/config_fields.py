"""Makes a config of transformers from its fields."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtcp.huggingface.own_errors import own_errors

CORRECT = "correct the config"


def model_types() -> list[str]:
    """The model types that transformers knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING.keys())


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a config.json, model_type among them.

    Raises:
        ValueError: not JSON, or without a model_type.
    """
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"A config is a file of JSON, got {str(path)!r}, where {error}: name the config.json "
            f"that save_pretrained wrote."
        ) from None
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        names = sorted(fields)[:8] if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(
            f"A config names its model_type, got {str(path)!r} with {names}: add it to the file, "
            f"or name a model type instead."
        )
    return fields


def values_in_layers(config: Any, name: str) -> list[Any]:
    """The values that a field has in a model: those of its layers, where these have their own.

    Empty where a config has no such field, or None.
    """
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    values = [getattr(layer, name, None) for layer in layers]
    return [x for place, x in enumerate(values) if x is not None and x not in values[:place]]


def config_of(fields: Mapping[str, Any], remedy: str = CORRECT) -> Any:
    """The config that these fields make, model_type among them.

    Args:
        remedy: what to do where transformers refuses a value.
    Raises:
        ValueError: transformers does not know the model type, or refuses a value.
    """
    from transformers import AutoConfig

    rest = {key: value for key, value in fields.items() if key != "model_type"}
    model_type = fields["model_type"]
    if model_type not in model_types():
        close = difflib.get_close_matches(model_type, model_types(), n=1)
        hint = f"did you mean {close[0]}?" if close else "correct it."
        raise ValueError(
            f"A config is a config.json, its folder, or of a model type that transformers knows, "
            f"got {model_type!r}: {hint}"
        )
    with own_errors(f"transformers makes a config of {model_type!r}", remedy):
        return AutoConfig.for_model(model_type, **rest)
