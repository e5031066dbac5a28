"""How a function becomes an op of torch, as all of ours do."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.library import CustomOpDef

from dtcp.autocast import outside_autocast


def local_op(
    name: str, *, schema: str | None = None
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a function an op that moves nothing; its body runs outside of autocast.

    It has no derivative in forward mode, of which torch would drop its share without a word.

    Args:
        name: dtcp::<name>.
        schema: as of torch.library.custom_op; None reads it off the annotations.
    """

    def make(function: Callable[..., Any]) -> CustomOpDef:
        body = outside_autocast(_without_tangents(name, function))
        return torch.library.custom_op(name, mutates_args=(), schema=schema)(body)

    return make


def _without_tangents(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The body of an op that refuses what forward mode gives a tangent."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, Tensor) and unpack_dual(x).tangent is not None for x in args):
            raise NotImplementedError(
                f"{name} is differentiated in reverse alone, got a dual tensor of forward mode: "
                f"use torch.autograd.grad or torch.func.vjp, not jvp, for code around it."
            )
        return function(*args, **kwargs)

    return run
