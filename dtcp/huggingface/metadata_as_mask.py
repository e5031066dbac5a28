"""Passes metadata in place of the mask, for layers that pass no keyword arguments to attention.

Most layers of transformers pass the keyword arguments of the model's call on to their attention.
Some drop them (StableLM, Nemotron); but they pass a mask, which a model with mixers does not need.
Nothing is kept between calls, so a checkpointed layer runs again as it did. A model that does not
even pass them to its base model (Mamba2) is outside of all layers: it sets them on the base model
while it is called.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from dtcp.forward import wrap_forward
from dtcp.huggingface.recurrent_layers import kernel_names
from dtcp.metadata import BatchMetadata

MASK, CONV_MASK = "attention_mask", "conv_mask"
_INDEX, _BASE, _CONFIG = "dtcp_mask_index", "dtcp_metadata_of_base", "_dtcp_metadata"


def mask_argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The mask that a module is called with; None without one."""
    index = mask_index(module)
    if MASK in kwargs or index is None:
        return kwargs.get(MASK)
    return args[index] if index < len(args) else None


def mask_index(module: nn.Module) -> int | None:
    """The index of the mask among the arguments of a module's forward; None if it takes none."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return names.index(MASK) if MASK in names else None


def pass_metadata_as_mask(name: str, layer: nn.Module) -> None:
    """Make a layer, or a model, pass on the metadata of its batch where it passes on a mask."""
    is_layer = any(part.isdigit() for part in name.split("."))
    if not is_layer and _makes_masks(layer):
        # A model, not a layer, that passes its layers a mask which it makes itself.
        wrap_forward(layer, _set_for_masks)
        return
    vars(layer)[_INDEX] = mask_index(layer)
    wrap_forward(layer, _replace_mask)


def _makes_masks(model: nn.Module) -> bool:
    """Whether a model makes its masks by transformers' functions, or passes on what it is given."""
    names = (name for module in model.modules() for name in kernel_names(module))
    return any(name.startswith("create_") and "mask" in name for name in names)


def _replace_mask(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    index, mask = getattr(layer, _INDEX), kwargs["attn_metadata"]
    before = mask_argument(layer, args, kwargs)
    if isinstance(before, Mapping):
        # One for attention and one for convolutions, say: each part of a layer takes its own.
        mask = dict.fromkeys(before, mask)
    if CONV_MASK in kwargs:
        # By keyword, where a layer takes one for its convolutions apart.
        kwargs[CONV_MASK] = kwargs["attn_metadata"]
    if index < len(args):
        return forward(*args[:index], mask, *args[index + 1 :], **kwargs)
    return forward(*args, **{**kwargs, MASK: mask})


class MetadataAsMask(BatchMetadata):
    """The metadata of a batch, in place of a mask."""

    def __init__(self, batch: BatchMetadata) -> None:
        vars(self).update(vars(batch))

    def to(self, _: Any) -> "MetadataAsMask":
        """The same: some models convert their mask."""
        return self


def _set_for_masks(model: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with metadata_for_masks(model.config, MetadataAsMask(kwargs["attn_metadata"])):
        return forward(*args, **kwargs)


@contextmanager
def metadata_for_masks(config: Any, batch: Any) -> Iterator[None]:
    """Inside, masks that are made of this config stand for the metadata of a batch."""
    setattr(config, _CONFIG, batch)
    try:
        yield
    finally:
        delattr(config, _CONFIG)


def metadata_of_config(config: Any) -> Any:
    """The metadata that masks of a config stand for; None where they are passed by keyword."""
    return getattr(config, _CONFIG, None)


def pass_metadata_to_base(model: Any) -> None:
    """Make a model pass the metadata of its batch to its base model."""
    wrap_forward(model.base_model, _take_from_base)
    wrap_forward(model, _set_on_base)


def _set_on_base(model: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    vars(model.base_model)[_BASE] = kwargs["attn_metadata"]
    try:
        return forward(*args, **kwargs)
    finally:
        del vars(model.base_model)[_BASE]


def _take_from_base(base: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if "attn_metadata" not in kwargs and _BASE in vars(base):
        kwargs["attn_metadata"] = vars(base)[_BASE]
    return forward(*args, **kwargs)
