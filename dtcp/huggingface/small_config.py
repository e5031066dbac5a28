"""Configs of transformers' models, small enough to run anywhere, with all their kinds of layers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtcp.huggingface.config_fields import CORRECT, config_of, read_fields
from dtcp.huggingface.language_model import parameter_count
from dtcp.huggingface.small_sizes import BY_MODEL_TYPE, REQUIRED, TINY

MOST_PARAMETERS = 2**21
"""Models of up to this size are run as their config says; larger ones are shrunk."""

UNRELATED_FIELDS = (
    *("architectures", "auto_map", "dtype", "torch_dtype", "quantization_config"),
    *("transformers_version", "_name_or_path", "bos_token_id", "eos_token_id"),
)
"""Fields that have nothing to do with how tokens meet; some would not fit a small model."""

NUM_LAYERS, MOST_LAYERS = 2, 6

_SPECIAL_TOKENS: Mapping[str, int] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_SECTIONS = "mrope_section"
_FACTORS, _LIMIT = ("short_factor", "long_factor"), "original_max_position_embeddings"
ROTARY_LIMIT = 16
"""Tokens past which a tiny model has other rotary frequencies; a check's rows have more."""

_HEADS = ("num_attention_heads", "num_key_value_heads")

Fields = dict[str, Any]
"""Values of a config's fields; those of a config inside of it are such a dict, too."""


@dataclass(frozen=True)
class SmallConfig:
    """A config, and what was changed to make it small, in words."""

    config: Any
    notes: tuple[str, ...] = ()


def small_config(source: str, change: Mapping[str, Any], remedy: str = CORRECT) -> SmallConfig:
    """The tiny config of a model type; or that of a config.json, shrunk if it is too large to run.

    Configs inside of a config (text_config, vision_config) are shrunk with it.

    Args:
        source: a model type of transformers, or the path of a config.json or of its folder.
        change: values of fields, in the small config too; "text_config.field" for one inside.
        remedy: what to do where transformers refuses a value.
    Raises:
        ValueError: no such file, model type or field, or values that the config refuses.
    """
    if source and Path(source).is_dir():
        source = str(Path(source, "config.json"))
    is_file = source.endswith(".json")
    if is_file and not Path(source).is_file():
        raise ValueError(f"A config is a file that exists, got {source!r}: correct the path.")
    fields = _related(read_fields(Path(source))) if is_file else {"model_type": source}
    whole = config_of(fields, remedy)
    changed = _changed_fields(whole, change)
    if is_file:
        exact = config_of(_merged(fields, changed), remedy)
        if parameter_count(exact, remedy) <= MOST_PARAMETERS:
            return SmallConfig(exact)
    shrunk = _merged({"pad_token_id": 0, **_shrunk(whole, changed)}, changed)
    notes = tuple(_notes(whole, shrunk)) if is_file else ()
    return SmallConfig(config_of(_merged(fields, shrunk), remedy), notes)


def _related(fields: Fields) -> Fields:
    """Fields, and those of configs inside, without the ones that have nothing to do with tokens."""
    return {
        key: _related(value) if isinstance(value, dict) and "model_type" in value else value
        for key, value in fields.items()
        if key not in UNRELATED_FIELDS
    }


def _changed_fields(config: Any, change: Mapping[str, Any]) -> Fields:
    """Where the changed fields lie: in the config, or in that of its text model.

    Raises:
        ValueError: a field that neither has.
    """
    changed: Fields = {}
    for name, value in change.items():
        path = name.split(".")
        key, parts = path[-1], path[:-1]
        if not parts and not _has(config, key):
            text = config.get_text_config(decoder=True)
            parts = [part for part, inner in _inner(config).items() if inner is text]
        owners = [config]
        for part in parts:
            owners.append(getattr(owners[-1], part, None))
        if owners[-1] is None or not _has(owners[-1], key):
            raise ValueError(
                f"--set changes fields that a config has, got {name!r}, which that of "
                f"{config.model_type!r} has not: name one of {sorted(_fields(config))}."
            )
        now = _fields(owners[-1]).get(owners[-1].attribute_map.get(key, key))
        # A config of floats refuses 0.
        value = float(value) if type(now) is float and type(value) is int else value
        fields: Fields = {key: value}
        for part, owner in zip(reversed(parts), reversed(owners[1:]), strict=True):
            fields = {part: {"model_type": owner.model_type, **fields}}
        changed = _merged(changed, fields)
    return changed


def _has(config: Any, key: str) -> bool:
    return key in config.attribute_map or key in vars(config) or f"_{key}" in vars(config)


def _fields(config: Any) -> Fields:
    """All fields, those too that differ from layer to layer, which attributes would refuse."""
    return {key: value for key, value in vars(config).items() if not key.startswith("_")}


def _inner(config: Any) -> dict[str, Any]:
    """The configs inside of a config, by the names of their fields."""
    return {key: x for key, x in _fields(config).items() if hasattr(x, "to_diff_dict")}


def _merged(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> Fields:
    """Fields with changes, which reach into configs inside."""
    merged = dict(fields)
    for key, value in changes.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, dict) and "model_type" in value:
            merged[key] = _merged(inner, value)
        else:
            merged[key] = value
    if "rope_parameters" in changes:
        # The former name of the field, which would take precedence.
        merged.pop("rope_scaling", None)
    return merged


def _shrunk(config: Any, changed: Fields) -> Fields:
    """The changes that make a config tiny: larger sizes, and the number of layers."""
    true_names = config.attribute_map
    names = {true: name for name, true in true_names.items()}
    values = _fields(config)
    fields: Fields = {}
    for key, value in values.items():
        most = TINY.get(key, TINY.get(names.get(key, "")))
        missing = value is None and key in REQUIRED
        if most and (missing or (type(value) is int and value > most)):
            fields[key] = most
    for key, token in _SPECIAL_TOKENS.items():
        if type(values.get(key)) is int and values[key] >= TINY["vocab_size"]:
            fields[key] = token
    for key, inner in _inner(config).items():
        fields[key] = {"model_type": inner.model_type, **_shrunk(inner, changed.get(key, {}))}
    heads, kv_heads = (true_names.get(key, key) for key in _HEADS)
    if heads in fields and kv_heads in fields and values[heads] == values[kv_heads]:
        fields[kv_heads] = fields[heads]
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and rope.get(_SECTIONS):
        sections = _scaled(rope[_SECTIONS], TINY["head_dim"], _head_dim(config))
        fields["rope_parameters"] = {**rope, _SECTIONS: sections}
    wanted = _wanted_layers(config, changed)
    fields |= _layers(config, changed) | _frequencies(config, fields)
    return _merged(fields, _of_family(config.model_type, wanted))


def _wanted_layers(config: Any, changed: Fields) -> Any:
    """How many layers the user asks for; None if they do not."""
    true_name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return changed.get("num_hidden_layers", changed.get(true_name))


def _of_family(model_type: str, wanted: Any) -> Fields:
    """The changes of a family; if it lists its layers, their kinds repeat for more layers."""
    family = dict(BY_MODEL_TYPE.get(model_type, {}))
    count = family.get("num_hidden_layers", NUM_LAYERS)
    if isinstance(wanted, int) and wanted > 0:
        lists = {key: x for key, x in family.items() if isinstance(x, list) and len(x) == count}
        family |= {key: [x[i % count] for i in range(wanted)] for key, x in lists.items()}
    return family


def _head_dim(config: Any) -> int:
    dim: int | None = getattr(config, "head_dim", None)
    return dim or config.hidden_size // config.num_attention_heads


def _scaled(parts: list[int], width: int, whole: int) -> list[int]:
    """Channels of each axis of positions, for heads of `width` channels instead of `whole`."""
    floors, rests = zip(*(divmod(part * width, whole) for part in parts), strict=True)
    missing = sum(parts) * width // whole - sum(floors)
    first = sorted(range(len(parts)), key=lambda i: -rests[i])[:missing]
    return [floor + (i in first) for i, floor in enumerate(floors)]


def _frequencies(config: Any, fields: Fields) -> Fields:
    """A limit of rotary frequencies that rows go past, and factors for those of tiny heads."""
    whole = getattr(config, "rope_parameters", None) or {}
    parameters = fields.get("rope_parameters", whole)
    if parameters.get("rope_type") == "dynamic":
        return {"max_position_embeddings": ROTARY_LIMIT}
    if not all(key in parameters for key in _FACTORS):
        return {}
    heads = config.attribute_map.get(_HEADS[0], _HEADS[0])
    width = fields.get("hidden_size", config.hidden_size) // fields.get(
        heads, getattr(config, heads)
    )
    width = fields.get("head_dim", getattr(config, "head_dim", None)) or width
    count = int(width * (parameters.get("partial_rotary_factor") or 1.0)) // 2
    own = {key: parameters[key] for key in _FACTORS}
    small = {key: x[:: max(1, len(x) // count)][:count] for key, x in own.items()}
    limit = {_LIMIT: ROTARY_LIMIT}
    changed = {"rope_parameters": {**parameters, **small, **limit}}
    return changed | (limit if hasattr(config, _LIMIT) else {})


def _layers(config: Any, changed: Fields) -> Fields:
    """One layer of each kind that a config has, at least two; lists keep those layers' entries.

    Where the number of layers is changed by hand, the kinds take turns.
    """
    true_name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    of_family = BY_MODEL_TYPE.get(config.model_type, {}).get("num_hidden_layers")
    wanted = _wanted_layers(config, changed) or of_family
    values = _fields(config)
    count = values.get(true_name)
    if not isinstance(count, int) or count < 1:
        return {}
    lists = {key: x for key, x in values.items() if isinstance(x, list)}
    per_layer = {key: x for key, x in lists.items() if len(x) == count}
    indices = {key: x for key, x in lists.items() if key not in per_layer and _are_layers(key, x)}
    overrides = config.to_dict().get("per_layer_config") or {}
    overrides = {int(layer): fields for layer, fields in overrides.items()}

    def kind(i: int) -> str:
        numbered = [i in x for x in indices.values()]
        return str(([x[i] for x in per_layer.values()], numbered, overrides.get(i)))

    kinds = [kind(i) for i in range(count)]
    chosen = sorted(kinds.index(kind) for kind in dict.fromkeys(kinds))[:MOST_LAYERS]
    if isinstance(wanted, int) and wanted > 0:
        chosen = [chosen[i % len(chosen)] for i in range(wanted)]
    elif len(chosen) < NUM_LAYERS:
        chosen = [chosen[0]] * NUM_LAYERS
    fields: Fields = {true_name: len(chosen)}
    fields |= {key: [_tiny(key, x[i]) for i in chosen] for key, x in per_layer.items()}
    fields |= {key: [n for n, i in enumerate(chosen) if i in x] for key, x in indices.items()}
    if overrides:
        fields["per_layer_config"] = {
            n: _tiny_layer(overrides[i]) for n, i in enumerate(chosen) if i in overrides
        }
    return fields


def _tiny_layer(own: Fields) -> Fields:
    """Fields of one layer, twice as large as those of the others, so that they still differ."""
    tiny = {key: _tiny(key, x, 2) for key, x in own.items()}
    heads, kv_heads = _HEADS
    if heads in own and own[heads] == own.get(kv_heads):
        tiny[kv_heads] = tiny[heads]
    return tiny


def _are_layers(key: str, value: list[Any]) -> bool:
    """Whether a list holds numbers of layers."""
    return all(type(x) is int for x in value) and ("layer" in key or key == "full_attn_idxs")


def _tiny(key: str, value: Any, factor: int = 1) -> Any:
    most = TINY.get(key.removesuffix("_per_layer"))
    return min(value, factor * most) if most and type(value) is int else value


def _notes(whole: Any, shrunk: Fields, prefix: str = "") -> Iterator[str]:
    for key, small in shrunk.items():
        value = getattr(whole, key, None)
        if isinstance(small, dict) and "model_type" in small:
            yield from _notes(value, small, f"{prefix}{key}.")
        elif key != "model_type" and small != value:
            yield f"shrunk {prefix}{key}: {_brief(value)} -> {_brief(small)}"


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
