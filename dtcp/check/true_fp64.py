"""Makes transformers' recurrent kernels compute in true fp64; by themselves they use fp32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dtcp.huggingface.recurrent_forwards import WRITTEN_AGAIN
from dtcp.huggingface.recurrent_layers import recurrent_layers, with_kernels


class TrueFP64(TorchFunctionMode):
    """Inside, casts to fp32 are casts to fp64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **kwargs)


@contextmanager
def kernels_in_fp64(model: nn.Module) -> Iterator[None]:
    """Inside, recurrent layers of an unmodified model compute their states in fp64."""
    # Weights that a model keeps in fp32 are multiplied in fp32.
    layers = [
        layer
        for layer in recurrent_layers(model)
        if all(p.dtype != torch.float32 for p in layer.parameters())
    ]
    for layer in layers:
        # Those without a kernel to name cast in their own forward.
        whole = type(layer).__name__ in WRITTEN_AGAIN
        own = type(layer).forward
        forward = _in_fp64("", own) if whole else with_kernels(layer, _in_fp64)
        layer.forward = MethodType(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _in_fp64(_: str, own: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with TrueFP64():
            return own(*args, **kwargs)

    return run
