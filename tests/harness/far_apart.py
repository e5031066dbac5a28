"""Tensors whose neighbours lie so far apart in memory that offsets inside a tile pass 2**31."""

from pathlib import Path

import torch
from torch import Tensor

REACH = 2**31 + 2**20
"""Numbers between the first and the last along a dim; files of so many are sparse."""


def far_apart(x: Tensor, dim: int, file: Path) -> Tensor:
    """The same numbers in a file that is mapped to memory, spread along one dim."""
    sizes = [1 if axis == dim else size for axis, size in enumerate(x.shape)]
    strides = list(torch.empty(sizes, device="meta").stride())
    strides[dim] = REACH // (x.shape[dim] - 1)
    size = strides[dim] * x.shape[dim]
    memory = torch.from_file(str(file), shared=True, size=size, dtype=x.dtype)
    return memory.as_strided(x.shape, strides).copy_(x)
