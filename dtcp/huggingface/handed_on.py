"""Layers that hand their attention a mask and nothing else: the metadata go in its place.

Most layers of transformers hand the keyword arguments of the model's call on to their attention.
Some end them there (StableLM, Nemotron); what they hand on is the mask, and a model with mixers
has none. Nothing is remembered between calls, so a checkpointed layer runs again as it did. A model
that does not even hand them to the model inside of it (Mamba2) is outside of all layers: it leaves
them there while it is called.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dtcp.forward import wrap_forward
from dtcp.huggingface.recurrent_layers import kernel_names
from dtcp.metadata import BatchMetadata

MASK = "attention_mask"
_INDEX, _LEFT, _BATCH = "dtcp_mask_index", "dtcp_left_for_base", "_dtcp_batch"


def mask_argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The mask that a module is called with; None without one."""
    index = mask_index(module)
    if MASK in kwargs or index is None:
        return kwargs.get(MASK)
    return args[index] if index < len(args) else None


def mask_index(module: nn.Module) -> int | None:
    """Where the mask stands among the arguments of a module's forward; None if it takes none."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return names.index(MASK) if MASK in names else None


def hand_on_in_the_mask(name: str, layer: nn.Module) -> None:
    """Let a layer, or a model, hand on the metadata of its batch where it hands on a mask."""
    is_layer = any(part.isdigit() for part in name.split("."))
    if not is_layer and _makes_masks(layer):
        # No layer, but a model that hands its layers the mask that it makes.
        wrap_forward(layer, _leave_for_mask)
        return
    vars(layer)[_INDEX] = mask_index(layer)
    wrap_forward(layer, _in_the_mask)


def _makes_masks(model: nn.Module) -> bool:
    """Whether a model makes its masks by transformers' functions, or hands on what it is given."""
    names = (name for module in model.modules() for name in kernel_names(module))
    return any(name.startswith("create_") and "mask" in name for name in names)


def _in_the_mask(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    index = getattr(layer, _INDEX)
    if index < len(args):
        return forward(*args[:index], kwargs["attn_metadata"], *args[index + 1 :], **kwargs)
    return forward(*args, **{**kwargs, MASK: kwargs["attn_metadata"]})


class HandedOn(BatchMetadata):
    """The metadata of a batch in the place of a mask."""

    def __init__(self, batch: BatchMetadata) -> None:
        vars(self).update(vars(batch))

    def to(self, _: Any) -> "HandedOn":
        """The same: some models convert their mask."""
        return self


def _leave_for_mask(model: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with left_for_mask(model.config, HandedOn(kwargs["attn_metadata"])):
        return forward(*args, **kwargs)


@contextmanager
def left_for_mask(config: Any, batch: Any) -> Iterator[None]:
    """Inside, masks that are made by this config stand for the metadata of a batch."""
    setattr(config, _BATCH, batch)
    try:
        yield
    finally:
        delattr(config, _BATCH)


def batch_of_mask(config: Any) -> Any:
    """What is left for the masks of a config; None where it is handed on otherwise."""
    return getattr(config, _BATCH, None)


def hand_to_base(model: Any) -> None:
    """Let a model hand on the metadata of its batch to the model inside of it."""
    wrap_forward(model.base_model, _from_above)
    wrap_forward(model, _leave_for_base)


def _leave_for_base(model: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    vars(model.base_model)[_LEFT] = kwargs["attn_metadata"]
    try:
        return forward(*args, **kwargs)
    finally:
        del vars(model.base_model)[_LEFT]


def _from_above(base: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if "attn_metadata" not in kwargs and _LEFT in vars(base):
        kwargs["attn_metadata"] = vars(base)[_LEFT]
    return forward(*args, **kwargs)
