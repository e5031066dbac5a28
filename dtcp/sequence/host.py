"""Batches are planned on the host, for training too, whatever context they are planned in."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

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
