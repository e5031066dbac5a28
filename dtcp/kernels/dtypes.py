"""The dtypes that kernels compute in."""

import torch


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and partial results are held: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
