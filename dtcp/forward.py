"""Put something around a module's forward, so that a deep copy of the module has its own."""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


def wrap_forward(module: nn.Module, around: Callable[..., Any]) -> None:
    """Let a module run `around(module, forward, *args, **kwargs)`; forward is what it ran before.

    A closure over the module or its bound forward would not do: copy.deepcopy leaves functions as
    they are, and the copy would compute with the weights of the original. Methods it binds anew.
    Nor would functools.partial: dynamo (2.13) guards its identity, a graph for each layer.

    Args:
        around: reads the module and its forward from its arguments, not from where it was made.
    """
    name = "_forward_inside"
    while name in vars(module):
        name += "_again"
    setattr(module, name, module.forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(self, getattr(self, name), *args, **kwargs)

    module.forward = MethodType(forward, module)
