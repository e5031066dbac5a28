"""The config that a user names: a preset, a config.json, its folder, or a model type."""

import difflib
from copy import deepcopy
from pathlib import Path
from typing import Any

from dtcp.huggingface.config_fields import config_of, model_types, read_fields

REMEDY = "correct the config, or give --model module:function, which returns the model"
"""What to do where transformers builds no model of a config."""

PRESETS = Path(__file__).parent / "presets"


def read_hf_config(source: str) -> tuple[str, dict[str, Any]]:
    """(name, fields) of a config; of a model type, those that transformers gives it by default.

    Raises:
        ValueError: no such file, preset or model type; no JSON; no model_type.
    """
    path = config_file(source)
    if path is None:
        return source, config_of({"model_type": source}, REMEDY).to_dict()
    fields = read_fields(path)
    name = path.absolute().parent.name if path.name == "config.json" else path.stem
    return name, fields


def config_file(source: str) -> Path | None:
    """The file that a source names, as a preset, a folder or a path; None for a model type.

    Raises:
        ValueError: the source is none of these.
    """
    preset = PRESETS / f"{source}.json"
    path = preset if preset.is_file() else Path(source)
    if source and path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if path.is_file():
        return path
    types = [] if path.exists() or path.suffix == ".json" else model_types()
    if source in types:
        return None
    presets = sorted(each.stem for each in PRESETS.glob("*.json"))
    close = difflib.get_close_matches(source, [*presets, *types], n=1)
    hint = f"did you mean {close[0]}? Presets are" if close else "presets are"
    if path.suffix == ".json":
        hint = f"there is no such file; {hint}"
    elif "/" in source:
        hint = f"nothing is downloaded, so give its config.json; {hint}"
    raise ValueError(
        f"A config is a config.json, its folder, a preset or a model type of transformers, got "
        f"{source!r}: {hint} {', '.join(presets)}."
    )


def text_model_of(config: Any) -> Any:
    """The config of the causal model of text inside of a model of several modalities, or itself."""
    text = config.get_text_config(decoder=True)
    return text if text is not config and _is_causal(text) else config


def _is_causal(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def without_dtype(config: Any) -> Any:
    """A copy of a config, and of those inside, without a dtype, which its builder chooses."""
    copied = deepcopy(config)
    for each in (copied, *(getattr(copied, name) for name in copied.sub_configs)):
        if each is not None:
            each.dtype = None
    return copied
