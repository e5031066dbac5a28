"""Batches are planned on the host, whatever device new tensors have by default."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_host(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose new tensors are the host's: as under torch.set_default_device("cpu").

    Planning reads its numbers as it goes, which a GPU would be waited for at each; beside a batch
    on the host, tensors of another device are an error in the midst of it.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run
