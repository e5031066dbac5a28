"""Tensors as torch.autocast would hand them to an op of torch; ours are handed what a model has."""

import torch
from torch import Tensor


def as_autocast_casts(*xs: Tensor) -> tuple[Tensor, ...]:
    """The tensors, in the dtype of autocast where it is on; those of fp64 as they are."""
    device = xs[0].device.type
    if not torch.is_autocast_enabled(device):
        return xs
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in xs)
