"""Configs of transformers' models, small enough to be run here, with all their kinds of layers."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MOST_PARAMETERS = 2**21
"""Of a model that is run as its config says."""

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

UNUSED = (
    *("architectures", "auto_map", "dtype", "torch_dtype", "quantization_config"),
    *("transformers_version", "_name_or_path", "bos_token_id", "eos_token_id"),
)
"""Fields that say nothing of how tokens meet, and of which some would not fit a small model."""


@dataclass(frozen=True)
class Small:
    """A config, and what was done to it, in words."""

    config: Any
    said: tuple[str, ...] = ()


def small_config(source: str, change: Mapping[str, Any]) -> Small:
    """The config of a model type, tiny; or of a config.json, as it is where that can be run.

    Args:
        change: fields that are something else, whatever else is done.
    Raises:
        ValueError: no such file, no such model type, or a file that names none.
    """
    from transformers import AutoConfig

    if not source.endswith(".json"):
        kinds = _layers(AutoConfig.for_model(source))
        return Small(AutoConfig.for_model(source, **{**TINY, "pad_token_id": 0, **kinds, **change}))
    whole_file = _read(source)
    given = _text_part(whole_file)
    said: tuple[str, ...] = ()
    if given != whole_file:
        said = ("of several modalities, the text model alone",)
    given = {key: value for key, value in given.items() if key not in UNUSED}
    kind = given.pop("model_type")

    def make(**fields: Any) -> Any:
        return AutoConfig.for_model(kind, **fields)

    if _parameters(make, {**given, **change}) <= MOST_PARAMETERS:
        return Small(make(**{**given, **change}), said)
    whole = make(**given)
    less = {**_shrunk(whole), **_layers(whole), "pad_token_id": 0}
    less = {key: value for key, value in less.items() if value != getattr(whole, key, None)}
    less = {**less, **change}
    said += tuple(
        f"shrunk {key}: {_brief(getattr(whole, key, None))} -> {_brief(small)}"
        for key, small in less.items()
    )
    return Small(make(**{**given, **less}), said)


def _read(source: str) -> dict[str, Any]:
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"A config is a file that exists, got {source!r}: correct the path.")
    given: dict[str, Any] = json.loads(path.read_text())
    return given


def _text_part(given: dict[str, Any]) -> dict[str, Any]:
    """What a model of several modalities says of its text model."""
    text = given.get("text_config", given)
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
    """Sizes that are larger than tiny; heads that share keys go on sharing them."""
    sizes = {key: getattr(config, key, None) for key in TINY}
    less = {key: TINY[key] for key, size in sizes.items() if size and size > TINY[key]}
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if kv_heads and kv_heads == heads:
        less["num_key_value_heads"] = TINY["num_attention_heads"]
    return less


def _layers(config: Any) -> dict[str, Any]:
    """One layer of each kind that a family has, two at least; of lists, those layers' entries."""
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
