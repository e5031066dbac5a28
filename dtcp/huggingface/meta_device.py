"""Surveys a model on the meta device by a narrow copy, as deep and with the same kinds of layers.

If a narrow copy cannot be made or run, and the model is small, the copy is as wide as the model.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from dtcp.huggingface.registry import UnreadAttentionError
from dtcp.huggingface.survey import Survey, survey
from dtcp.huggingface.token_dropouts import SurveyedDropout, dropouts_of_adapters

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

EMBEDDED = ("word_embed_proj_dim", "embedding_size")
"""Widths of embeddings: a model projects them where its hidden states are not as wide."""

HEADS = 2

STATES = (
    ("num_heads", "head_dim", "expand", "n_groups"),
    ("mamba_n_heads", "mamba_d_head", "mamba_expand", "mamba_n_groups"),
)
"""Of Mamba-2: heads times their width are so many times the model's width; groups of heads."""

SMALL = 2**26
"""Parameters of the largest model that is copied as it is: 256 MiB in fp32, on each rank."""


OF_ATTENTION = ("attn_config",)
"""Inner configs that do not belong to a modality."""


def survey_on_meta(model: Any) -> Survey:
    """What `survey` would find in a model that is still on the meta device.

    Raises:
        ValueError: several modalities; or a large model of which there is no narrow copy, or none
            that resembles it.
    """
    parts = [key for key in model.config.sub_configs if key not in OF_ATTENTION]
    if parts:
        raise ValueError(
            f"A model on the meta device has one modality, got {type(model).__name__} of {parts}: "
            f"build it on a real device, or build its text model."
        )
    is_small = sum(p.numel() for p in model.parameters()) <= SMALL
    of_adapters = dropouts_of_adapters(model)
    try:
        result, copy = _survey_of_copy(model, _narrow_config)
    except UnreadAttentionError:
        raise
    # The config of somebody else's family checks the sizes in its own class of errors, and its
    # model may raise any. A small model is tried again as it is, whose error is not caught; of a
    # large one the error is raised again, named.
    except Exception as error:
        if not is_small:
            raise ValueError(
                f"A model on the meta device is surveyed by a narrow copy made from its config, "
                f"got a {type(model).__name__} that has none ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}): build it on a real device."
            ) from error
    else:
        found = [replace(x, width=_own_width(x, copy, model)) for x in result.dropouts]
        is_known = not result.refused and all(each.width for each in found)
        if is_known or not is_small:
            return replace(result, dropouts=(*found, *of_adapters))
    result, _ = _survey_of_copy(model, lambda config: config)
    return replace(result, dropouts=(*result.dropouts, *of_adapters))


def small_copies(model: Any) -> Iterator[Callable[[], Any]]:
    """Builders of copies with fresh weights on this host: a narrow one; of a small model another.

    That is as wide as the model, for configs that refuse narrow sizes.
    """
    changes: list[Callable[[Any], Any]] = [_narrow_config]
    if sum(p.numel() for p in model.parameters()) <= SMALL:
        changes.append(lambda config: config)
    for change in changes:
        yield partial(_copy_of, model, change)


def _copy_of(model: Any, change: Callable[[Any], Any]) -> Any:
    return type(model)._from_config(change(deepcopy(model.config))).train(model.training)


def _survey_of_copy(model: Any, change: Callable[[Any], Any]) -> tuple[Survey, Any]:
    copy = _copy_of(model, change)
    result = survey(copy)
    modules, own = dict(model.named_modules()), dict(copy.named_modules())
    for attention in result.attentions:
        module = modules.get(attention.name)
        scales = [getattr(x, "scaling", None) for x in (own[attention.name], module)]
        if module is None or scales[0] != scales[1]:
            raise ValueError(
                f"{attention.name} has scale={scales[0]}, and {scales[1]} in the model"
            )
    return result, copy


def _own_width(dropout: SurveyedDropout, copy: Any, model: Any) -> int | None:
    """Channels that a dropout has in a model, by those in its narrow copy; None if not known.

    They are as many as a weight around it has, in the copy and so in the model.
    """
    around = dropout.name
    while around:
        around = around.rpartition(".")[0]
        narrow, own = (_channels(x.get_submodule(around)) for x in (copy, model))
        sizes = {own.get(key) for key, size in narrow.items() if size == dropout.width}
        if sizes:
            return sizes.pop() if len(sizes) == 1 else None
    return None


def _channels(module: nn.Module) -> dict[tuple[str, int], int]:
    """The sizes of weights, but for how many tokens and positions an embedding has."""
    tables = {id(x.weight) for x in module.modules() if isinstance(x, nn.Embedding)}
    return {
        (name, dim): size
        for name, x in module.named_parameters()
        for dim, size in enumerate(x.shape)
        if dim or id(x) not in tables
    }


def _narrow_config(config: Any) -> Any:
    """The config, changed to one of a narrow model."""
    of_layers = config.to_dict().get("per_layer_config") or {}
    if of_layers:
        # While layers have fields of their own, these cannot be read of the config as a whole.
        config.per_layer_config = None
    heads, kv_heads = (
        getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")
    )
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim if heads is None or head_dim else config.hidden_size // heads
    narrow: dict[str, Any] = {
        key: size for key, size in NARROW.items() if getattr(config, key, None)
    }
    narrow["hidden_size"] = HEADS * (head_dim or 32)
    for key in EMBEDDED:
        if width := getattr(config, key, None):
            narrow[key] = narrow["hidden_size"] // (1 if width == config.hidden_size else 2)
    narrow |= {} if heads is None else {"num_attention_heads": HEADS}
    padding = getattr(config, "pad_token_id", None)
    # Some models count positions from the padding id on.
    narrow["pad_token_id"] = padding if padding and padding < NARROW["vocab_size"] else 0
    if kv_heads:
        narrow["num_key_value_heads"] = HEADS if kv_heads == heads else 1
    for names in STATES:
        narrow |= _narrow_states(config, narrow["hidden_size"], *names)
    for key, size in narrow.items():
        before = getattr(config, key, None)
        setattr(config, key, [size] * len(before) if isinstance(before, list) else size)
    if of_layers:
        config.per_layer_config = {
            layer: {key: narrow.get(key, value) for key, value in fields.items()}
            for layer, fields in of_layers.items()
        }
    return config


def _narrow_states(
    config: Any, hidden_size: int, heads: str, head_dim: str, expand: str, groups: str
) -> dict[str, int]:
    """As many heads of a state as a narrow model has room for, of the same width, in one group."""
    width, times = (getattr(config, name, None) for name in (head_dim, expand))
    has_heads = getattr(config, heads, None) and getattr(config, groups, None)
    if not has_heads or not isinstance(width, int) or not isinstance(times, int | float):
        return {}
    return {heads: max(1, int(times * hidden_size) // width), groups: 1}
