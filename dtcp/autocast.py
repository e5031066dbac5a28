"""torch.autocast and our ops: these compute in the dtypes they are given, and sum in wider ones.

An op's body is Python, and autocast would reach into it: a product of fp32 that the body takes on
purpose, of states or of scores, would come out in bf16; in forward alone, for a backward pass runs
outside of autocast and would compute other weights than forward did. So bodies run outside of it,
as those of torch's own ops do, and what they are given is cast before.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dtcp._torch.ops import no_autocast

P = ParamSpec("P")
R = TypeVar("R")


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The body of an op: as it is, whatever context the op is called in."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with no_autocast():
            return function(*args, **kwargs)

    return run


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """For code that is traced, and computes as an op's body would: in the dtypes it is given."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def as_autocast_casts(*xs: Tensor) -> tuple[Tensor, ...]:
    """The tensors, in the dtype of autocast where it is on; those of fp64 as they are."""
    device = xs[0].device.type
    if not torch.is_autocast_enabled(device):
        return xs
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in xs)
