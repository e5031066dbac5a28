"""Configs of transformers' models, small enough to run anywhere, with all their kinds of layers."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MOST_PARAMETERS = 2**21
"""The largest model that is run as its config says; a larger one is shrunk."""

TINY: Mapping[str, int] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "sliding_window": 7,
    "max_position_embeddings": 128,
}
NUM_LAYERS = 2

UNRELATED_FIELDS = (
    *("architectures", "auto_map", "dtype", "torch_dtype", "quantization_config"),
    *("transformers_version", "_name_or_path", "bos_token_id", "eos_token_id"),
)
"""Fields that have nothing to do with how tokens meet; some would not fit a small model."""


@dataclass(frozen=True)
class SmallConfig:
    """A config, and what was changed to make it small, in words."""

    config: Any
    notes: tuple[str, ...] = ()


def small_config(source: str, change: Mapping[str, Any]) -> SmallConfig:
    """The tiny config of a model type; or that of a config.json, shrunk if it is too large to run.

    Args:
        source: a model type of transformers, or the path of a config.json.
        change: values of fields, in the small config too.
    Raises:
        ValueError: no such file, no such model type, or a file that names none.
    """
    from transformers import AutoConfig

    if not source.endswith(".json"):
        kinds = _layers(AutoConfig.for_model(source))
        return SmallConfig(
            AutoConfig.for_model(source, **{**TINY, "pad_token_id": 0, **kinds, **change})
        )
    file_fields = _read(source)
    fields = _text_part(file_fields)
    notes: tuple[str, ...] = ()
    if fields != file_fields:
        notes = ("of several modalities, the text model alone",)
    fields = {key: value for key, value in fields.items() if key not in UNRELATED_FIELDS}
    model_type = fields.pop("model_type")

    def make(**fields: Any) -> Any:
        return AutoConfig.for_model(model_type, **fields)

    if _parameters(make, {**fields, **change}) <= MOST_PARAMETERS:
        return SmallConfig(make(**{**fields, **change}), notes)
    whole = make(**fields)
    shrunk = {**_shrunk(whole), **_layers(whole), "pad_token_id": 0}
    shrunk = {key: value for key, value in shrunk.items() if value != getattr(whole, key, None)}
    shrunk = {**shrunk, **change}
    notes += tuple(
        f"shrunk {key}: {_brief(getattr(whole, key, None))} -> {_brief(small)}"
        for key, small in shrunk.items()
    )
    return SmallConfig(make(**{**fields, **shrunk}), notes)


def _read(source: str) -> dict[str, Any]:
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"A config is a file that exists, got {source!r}: correct the path.")
    fields: dict[str, Any] = json.loads(path.read_text())
    return fields


def _text_part(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of the text model, if the model has several modalities."""
    text = fields.get("text_config", fields)
    if "model_type" not in text:
        raise ValueError(
            f"A config names its model_type, got the fields {sorted(text)[:8]}: add it, or name a "
            f"model type instead of a file."
        )
    return dict(text)


def _parameters(make: Callable[..., Any], fields: Mapping[str, Any]) -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make(**fields))
    return sum(p.numel() for p in model.parameters())


def _shrunk(config: Any) -> dict[str, Any]:
    """Tiny values of the sizes that are larger; as many kv heads as heads, if that is so now."""
    sizes = {key: getattr(config, key, None) for key in TINY}
    smaller = {key: TINY[key] for key, size in sizes.items() if size and size > TINY[key]}
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if kv_heads and kv_heads == heads:
        smaller["num_key_value_heads"] = TINY["num_attention_heads"]
    return smaller


def _layers(config: Any) -> dict[str, Any]:
    """One layer of each kind that a family has, at least two; lists keep those layers' entries."""
    kinds = list(getattr(config, "layer_types", None) or ())
    chosen = [kinds.index(kind) for kind in dict.fromkeys(kinds)] or [0, 1]
    chosen = chosen if len(chosen) >= NUM_LAYERS else [chosen[0]] * NUM_LAYERS
    count = getattr(config, "num_hidden_layers", None)
    fields: dict[str, Any] = {"num_hidden_layers": len(chosen)}
    for key, value in config.to_dict().items():
        if isinstance(value, list) and count and len(value) == count:
            fields[key] = [value[index % count] for index in chosen]
    return fields


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
