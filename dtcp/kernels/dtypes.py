"""The dtypes that kernels compute and sum in."""

import torch
from torch import Tensor


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and partial results are held: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def zeros_for(x: Tensor) -> Tensor:
    """Zeros to sum gradients of x into, in the dtype of `accumulation`."""
    return torch.zeros(x.shape, dtype=accumulation(x.dtype), device=x.device)
