"""A module's own dicts of children and parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor


def children_of(module: torch.nn.Module) -> Mapping[str, torch.nn.Module | None]:
    """The very dict that holds them, by name; public are copies alone (2.11-2.15)."""
    return module._modules


@contextmanager
def parameters_replaced(module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a module finds these tensors where it has its own parameters (2.11-2.15)."""
    own = dict(module._parameters)
    module._parameters.update(cast(Any, tensors))
    try:
        yield
    finally:
        module._parameters.update(own)
