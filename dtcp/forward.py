"""Put something around a module's forward, so that a deep copy of the module has its own."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def wrap_forward(module: nn.Module, around: Callable[..., Any]) -> None:
    """Let a module run `around(module, forward, *args, **kwargs)`; forward is what it ran before.

    A closure over the module or its bound forward would not do: copy.deepcopy leaves functions as
    they are, and the copy would compute with the weights of the original.

    Args:
        around: reads the module and its forward from its arguments, not from where it was made.
    """
    module.forward = partial(around, module, module.forward)
