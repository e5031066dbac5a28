"""Put something around a module's forward, so that a deep copy of the module has its own.

pickle would lose it: of a bound method it stores the name, and finds the forward of the class under
it. So a module with something around its forward refuses to be pickled.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

INSIDE = "_forward_inside"
"""What the names begin with under which modules keep the forward that they ran before."""


def wrap_forward(module: nn.Module, around: Callable[..., Any]) -> None:
    """Let a module run `around(module, forward, *args, **kwargs)`; forward is what it ran before.

    A closure over the module or its bound forward would not do: copy.deepcopy leaves functions as
    they are, and the copy would compute with the weights of the original. Methods it binds anew.
    Nor would functools.partial: dynamo (2.13) guards its identity, a graph for each layer.

    Args:
        around: reads the module and its forward from its arguments, not from where it was made.
    """
    name = INSIDE
    while name in vars(module):
        name += "_again"
    setattr(module, name, module.forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(self, getattr(self, name), *args, **kwargs)

    module.forward = MethodType(forward, module)
    module.refuses_pickle = RefusesPickle()  # type: ignore[assignment]


class RefusesPickle:
    """What a module holds that cannot be pickled, with the reason."""

    def __reduce__(self) -> Any:
        raise TypeError(
            "A module that a plan or install_mixers has changed is not pickled, for its forward "
            "would be that of its class again, got one to pickle or to torch.save: save "
            "model.state_dict(), or torch.distributed.checkpoint's of it, and apply the plan to a "
            "new model."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "RefusesPickle":
        return self
