"""Recurrent layers of transformers: they call kernels by name, and the names are rebound.

A layer of transformers (5.23) calls its convolution and its state's rule as functions of its
module, `causal_conv1d_fn` and `torch_chunk_gated_delta_rule` for example, and passes them the
keyword arguments of its own call. Here the layer's own forward runs with functions in their place
that call mixers. Nothing in transformers is patched: the forward belongs to one module, and its
global names are a copy.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dtcp.forward import INSIDE, wrap_forward
from dtcp.huggingface.recurrent_forwards import WRITTEN_AGAIN
from dtcp.huggingface.recurrent_kernels import KERNELS
from dtcp.metadata import BatchMetadata
from dtcp.mixer import Mixer

OWN_MASK = "dtcp_own_mask"
"""Set on a module that gets a mask of its model's own making: all zeros, or ones [B, L]."""


@dataclass(frozen=True)
class SurveyedMixer:
    """One mixer that a recurrent layer needs.

    Args:
        name: of the mixer in its model.
        kind: its class.
        arguments: of its constructor, by keyword.
    """

    name: str
    kind: type[Mixer]
    arguments: tuple[tuple[str, Any], ...]

    def mixer(self) -> Mixer:
        return self.kind(**dict(self.arguments))


class KernelNotes(Protocol):
    """Records what layers call during a survey."""

    def note_unread(self, module: nn.Module) -> None:
        """A layer receives no metadata."""

    def note_own_mask(self, layer: nn.Module, mask: Tensor) -> None:
        """A layer receives a mask [B, L], which the model makes where it is given none."""

    def note_kernel(
        self, layer: nn.Module, name: str, kind: type[Mixer], arguments: Mapping[str, Any]
    ) -> None:
        """A layer calls a kernel that this mixer stands for."""


def recurrent_layers(model: nn.Module) -> list[nn.Module]:
    """Modules whose forward calls kernels that mixers stand for, by the names of functions."""
    return [
        m
        for m in model.modules()
        if type(m).__name__ in WRITTEN_AGAIN or kernel_names(m) & KERNELS.keys()
    ]


def kernel_names(module: nn.Module) -> set[str]:
    """Global names that the forward of a module's class reads."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set() if code is None else set(code.co_names)


def install_recurrent_mixers(model: nn.Module, surveyed: tuple[SurveyedMixer, ...]) -> None:
    """Give recurrent layers their mixers, and let their own forward call them."""
    # One function for all layers of a class, so that they share their graphs.
    forwards: dict[type, FunctionType] = {}
    for each in surveyed:
        name, _, attribute = each.name.rpartition(".")
        layer = model.get_submodule(name)
        if INSIDE not in vars(layer):
            if type(layer) not in forwards:
                forwards[type(layer)] = with_kernels(layer, _on_mixer)
            layer.forward = MethodType(forwards[type(layer)], layer)
            wrap_forward(layer, _on_batch)
        layer.add_module(attribute, each.mixer())


@contextmanager
def noting_kernels(model: nn.Module, notes: KernelNotes) -> Iterator[None]:
    """Inside, recurrent layers report which kernels they call, and no token reads another."""
    layers = [m for m in recurrent_layers(model) if "forward" not in vars(m)]
    for layer in layers:
        surveyed = with_kernels(layer, _while_surveyed)
        layer.forward = MethodType(_surveyed(surveyed, notes), layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _surveyed(forward: Callable[..., Any], notes: KernelNotes) -> Callable[..., Any]:
    def run(layer: nn.Module, *args: Any, attn_metadata: Any = None, **kwargs: Any) -> Any:
        if attn_metadata is None:
            notes.note_unread(layer)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 2:
            notes.note_own_mask(layer, mask)
        return forward(layer, *args, **kwargs, attn_metadata=(layer, notes))

    return run


def _on_batch(
    layer: nn.Module,
    forward: Callable[..., Any],
    *args: Any,
    attn_metadata: BatchMetadata | None = None,
    **kwargs: Any,
) -> Any:
    """A layer's forward, in which each kernel finds its mixer and its batch."""
    # A layer above may only pass on masks, and then the metadata are in their place.
    as_masks = [x for x in (*args, *kwargs.values()) if isinstance(x, BatchMetadata)]
    if attn_metadata is None and as_masks:
        attn_metadata = as_masks[0]
    args = tuple(None if isinstance(x, BatchMetadata) else x for x in args)
    kwargs = {key: x for key, x in kwargs.items() if not isinstance(x, BatchMetadata)}
    attention_mask = kwargs.pop("attention_mask", None)
    if getattr(layer, OWN_MASK, False):
        attention_mask = None
    if attn_metadata is None or attention_mask is not None:
        raise ValueError(
            f"{type(layer).__name__} reads the metadata of its batch alone, got attn_metadata of "
            f"type {type(attn_metadata).__name__}, attention_mask of type "
            f"{type(attention_mask).__name__}: pass attn_metadata=sharded.attn_metadata of "
            f"shard_hf_batch, and no mask."
        )
    return forward(*args, **kwargs, attn_metadata=(layer, attn_metadata))


def with_kernels(layer: nn.Module, kernel: Callable[[str, Any], Callable[..., Any]]) -> Any:
    """The forward of a recurrent layer's class, with other functions for its kernels.

    Args:
        kernel: of the name of a kernel and the layer's own, the function to call instead.
    """
    forward = WRITTEN_AGAIN.get(type(layer).__name__) or inspect.unwrap(type(layer).forward)
    names = forward.__globals__
    # Without __name__, for dynamo (2.13) would look names up in the module of that name.
    own = {key: x for key, x in names.items() if key != "__name__"}
    own |= {name: kernel(name, names[name]) for name in KERNELS if name in names}
    function = FunctionType(
        forward.__code__, own, forward.__name__, forward.__defaults__, forward.__closure__
    )
    function.__kwdefaults__ = forward.__kwdefaults__
    return function


def _on_mixer(name: str, _: Any) -> Callable[..., Any]:
    return KERNELS[name].by_mixer


def _while_surveyed(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    """Record the call. If a layer passes its kernel no metadata, the survey finds what it mixes."""

    def run(*args: Any, attn_metadata: Any = None, **kwargs: Any) -> Any:
        if attn_metadata is None:
            return own(*args, **kwargs)
        return KERNELS[name].surveyed(*args, attn_metadata=attn_metadata, **kwargs)

    return run
