"""Batches are planned on the host, in any context, and so that training can use the result.

What a device reads of them is copied there without making the host wait.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from dtcp.inference_mode import no_inference_tensors

P = ParamSpec("P")
R = TypeVar("R")


def on_host(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function's new tensors on the host, and usable in training.

    On the host, as under torch.set_default_device("cpu"): planning reads its numbers as it goes,
    and each read would wait for a GPU; beside a batch on the host, tensors of another device would
    be an error halfway through. And outside of torch.inference_mode, whose tensors no later step
    can save for its backward pass.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_inference_mode_enabled():
            with no_inference_tensors():
                return run(*args, **kwargs)
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run


def on_device(x: Tensor, device: torch.device | str) -> Tensor:
    """x on that device; a copy from the host to a GPU overlaps with what the GPU is doing.

    CUDA copies pageable memory only once all that was launched before has ended, whatever
    `non_blocking` says, and meanwhile the host launches nothing. Pinned memory is read when the
    GPU gets there, and torch's allocator gives the block to nobody else before that. A copy from a
    GPU is waited for: the host would read it before it has arrived.
    """
    if torch.device(device).type == "cuda" and x.device.type == "cpu" and x.numel():
        x = x.contiguous().pin_memory()
    return x.to(device, non_blocking=x.device.type == "cpu")
