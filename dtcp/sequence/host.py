"""Batches are planned on the host, for training too, whatever context they are planned in.

What a device reads of them follows without waiting for it.
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
    """A function whose new tensors are the host's, and of use in training.

    As under torch.set_default_device("cpu"): planning reads its numbers as it goes, which a GPU
    would be waited for at each; beside a batch on the host, tensors of another device are an error
    in the midst of it. And outside of torch.inference_mode, which makes tensors that no later step
    can keep for its backward pass.
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
    """x there; from the host to a GPU beside what the GPU is doing.

    CUDA takes pageable memory only once all that was launched before has ended, whatever
    `non_blocking` says, and meanwhile the host launches nothing. Pinned memory it reads when it
    gets there; torch's allocator of it gives the block to nobody before. What comes from a GPU is
    waited for: the host would read it before it is there.
    """
    if torch.device(device).type == "cuda" and x.device.type == "cpu" and x.numel():
        x = x.contiguous().pin_memory()
    return x.to(device, non_blocking=x.device.type == "cpu")
