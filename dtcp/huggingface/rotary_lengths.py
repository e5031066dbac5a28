"""Rotary frequencies that go by the longest position of a batch: longrope, and dynamic NTK.

A rotary embedding of transformers takes the largest of the positions that it is called with, and a
rank only has those of its shard. So it is called with one more, the largest of the batch, which the
host knows, and its output for that one is cut off again. All the rest is transformers' own code,
including what it keeps from one batch to the next.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.forward import wrap_forward
from dtcp.huggingface.images import counts_images, language_model_name
from dtcp.metadata import BatchMetadata
from dtcp.sequence.documents import Documents

_ROTARY, _OFFSET = "dtcp_rotary_by_length", "dtcp_offset"
_LAST, _UPDATE = "dtcp_last_position", "dtcp_update_frequencies"
_RULES = "transformers.modeling_rope_utils"
"""Where transformers chooses frequencies by the longest position."""


def last_position(rows: Mapping[str, Any], documents: Documents) -> int:
    """The largest position that one device would see in these rows, padding's among them."""
    given = rows.get("position_ids")
    if given is not None:
        return int(given.max())
    if any(len(lengths) > 1 for lengths in documents.lengths):
        return max(length for lengths in documents.lengths for length in lengths) - 1
    return documents.seq_len - 1


def rotary_by_length(model: nn.Module) -> dict[str, Any]:
    """The rotary embeddings of tokens that go by the longest position, by name."""
    named, text = model.named_modules(), language_model_name(model)
    return {name: m for name, m in named if name.startswith(text) and _reads_longest(m)}


def unread_lengths(model: Any) -> Iterator[str]:
    """Why some frequencies by the longest position are refused, in sentences."""
    found, kind = rotary_by_length(model), type(model).__name__
    for name, rotary in found.items():
        if not _is_updated(rotary) or _owner(model, name) is None:
            yield (
                f"{name} ({type(rotary).__name__}): chooses rotary frequencies by the longest "
                f"position it sees, and is no module of transformers' base model, which "
                f"knows that of the batch: use another rope_type."
            )
    if found and counts_images(model):
        yield (
            f"{kind} chooses rotary frequencies by the longest position, and works positions out "
            f"on the device, of the images of whole rows: use another rope_type."
        )
    read = {type(module.config) for module in model.modules() if _is_updated(module)}
    configs = {type(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for config in (config for key, config in configs.items() if key not in read):
        for rope_type in _rope_types(getattr(config, "rope_parameters", None)):
            if _by_length(rope_type):
                yield (
                    f"{kind} chooses rotary frequencies by the longest position it sees "
                    f"(rope_type={rope_type!r}), by code that is not transformers' own: use "
                    f"another rope_type."
                )


def install_rotary_lengths(model: Any, offset: int = 0) -> None:
    """Tell rotary embeddings that go by the longest position that of the batch.

    Args:
        offset: the position of a row's first token, as the model counts.
    """
    owners: dict[Any, list[nn.Module]] = {}
    for name, rotary in rotary_by_length(model).items():
        vars(rotary)[_UPDATE] = _update_alone()
        wrap_forward(rotary, _with_last)
        owners.setdefault(_owner(model, name), []).append(rotary)
    for owner, rotaries in owners.items():
        vars(owner)[_ROTARY], vars(owner)[_OFFSET] = tuple(rotaries), offset
        wrap_forward(owner, _tell_last)


def goes_by_length(model: nn.Module) -> bool:
    """Whether a model with mixers has rotary embeddings that go by the longest position."""
    return any(_ROTARY in vars(module) for module in model.modules())


@contextmanager
def at_last_position(model: nn.Module, last: int) -> Iterator[None]:
    """Inside, an unmodified model has the frequencies of rows whose largest position is this."""
    rotaries = rotary_by_length(model).values()
    with keeping_frequencies(model):
        for rotary in rotaries:
            vars(rotary)[_LAST], vars(rotary)[_UPDATE] = last, _update_alone()
            rotary.forward = partial(_with_last, rotary, rotary.forward)
        try:
            yield
        finally:
            for rotary in rotaries:
                del vars(rotary)[_LAST], vars(rotary)[_UPDATE], rotary.forward


@contextmanager
def keeping_frequencies(model: nn.Module) -> Iterator[None]:
    """Afterwards, rotary embeddings are as if nobody had called them inside."""
    rotaries = rotary_by_length(model).values()
    states = [(_cached(each), [x.clone() for x in each.buffers()]) for each in rotaries]
    try:
        yield
    finally:
        for rotary, (cached, buffers) in zip(rotaries, states, strict=True):
            for key in _cached(rotary):
                del vars(rotary)[key]
            vars(rotary).update(cached)
            for (name, _), x in zip(list(rotary.named_buffers()), buffers, strict=True):
                setattr(rotary, name, x)


def _cached(rotary: nn.Module) -> dict[str, Any]:
    """The length that each kind of layer has its frequencies for."""
    return {key: x for key, x in vars(rotary).items() if key.endswith("max_seq_len_cached")}


def _tell_last(owner: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A base model's forward; meanwhile, its rotary embeddings know the batch's last position."""
    metadata = kwargs.get("attn_metadata")
    last = metadata.last_position if isinstance(metadata, BatchMetadata) else None
    if last is None:
        raise ValueError(
            f"Rotary frequencies of {type(owner).__name__} go by the longest position of a batch, "
            f"got attn_metadata of type {type(metadata).__name__} that do not say it: pass those "
            f"of shard_hf_batch, or of shard_batch for rows with position_ids."
        )
    rotaries = getattr(owner, _ROTARY)
    for rotary in rotaries:
        vars(rotary)[_LAST] = last + getattr(owner, _OFFSET)
    try:
        return forward(*args, **kwargs)
    finally:
        for rotary in rotaries:
            del vars(rotary)[_LAST]


def _with_last(
    rotary: Any,
    forward: Callable[..., Any],
    x: Tensor,
    position_ids: Tensor,
    layer_type: str | None = None,
) -> Any:
    """A rotary embedding's forward, with the batch's last position behind those of the shard."""
    last = getattr(rotary, _LAST, None)
    if last is None:
        raise ValueError(
            f"Rotary frequencies go by the longest position of a batch, got a call of "
            f"{type(rotary).__name__} outside of the model that knows it: call the model that "
            f"parallelize_hf returned, or the base model inside of it."
        )
    longest = position_ids.new_full((*position_ids.shape[:-1], 1), last)
    # Padding that the layout added counts on beyond it, and does not exist on one device.
    positions = torch.cat((position_ids.clamp(max=last), longest), dim=-1)
    kind = {} if layer_type is None else {"layer_type": layer_type}
    rope_type = rotary.rope_type if layer_type is None else rotary.rope_type[layer_type]
    if "dynamic" in rope_type:
        # From a number on the host, to avoid waiting for the device.
        getattr(rotary, _UPDATE)(rotary, x, torch.tensor([last]), **kind)
        out = inspect.unwrap(type(rotary).forward)(rotary, x, positions, **kind)
    else:
        out = forward(x, positions, **kind)
    return tuple(map(_without_last, out)) if isinstance(out, tuple) else _without_last(out)


def _without_last(x: Tensor) -> Tensor:
    """[.., L + 1, D] -> [.., L, D], with strides of its own."""
    return x[..., :-1, :].clone()


def _update_alone() -> Callable[..., None]:
    """Transformers' update of an embedding's frequencies, without the embedding."""
    from transformers.modeling_rope_utils import dynamic_rope_update

    def nothing(
        rotary: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> None:
        """The embedding, which the update is made without."""

    return dynamic_rope_update(nothing)


def _reads_longest(module: Any) -> bool:
    kinds = getattr(module, "rope_type", None)
    if kinds is None:
        return False
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    of_layers = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    # PhiMoE scales by one of two numbers, whatever the kind of its frequencies.
    return any(map(_by_length, of_layers)) or "long_mscale" in parameters


def _is_updated(module: nn.Module) -> bool:
    """Whether transformers chooses a module's frequencies before its forward."""
    forward: Any = type(module).forward
    while forward is not None:
        if getattr(forward, "__globals__", {}).get("__name__") == _RULES:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _by_length(rope_type: Any) -> bool:
    """Whether frequencies of a kind go by the longest position, as transformers has it."""
    return isinstance(rope_type, str) and ("dynamic" in rope_type or rope_type == "longrope")


def _rope_types(parameters: Any) -> Iterator[Any]:
    if isinstance(parameters, Mapping):
        for key, value in parameters.items():
            if key == "rope_type":
                yield value
            yield from _rope_types(value)


def _owner(model: nn.Module, name: str) -> nn.Module | None:
    """The base model that holds a module, alone or in a list; None where a layer does."""
    from transformers import PreTrainedModel

    parent = name.rpartition(".")[0]
    while isinstance(model.get_submodule(parent), nn.ModuleList | nn.ModuleDict):
        parent = parent.rpartition(".")[0]
    owner = model.get_submodule(parent)
    return owner if isinstance(owner, PreTrainedModel) else None
