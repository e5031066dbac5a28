"""Gated linear attention on this rank's stretches of tokens: what strategies compute with."""

import warnings
from functools import cache

import torch

from dtcp.kernels.linear_attention.reference import ReferenceLinearAttention
from dtcp.kernels.linear_attention.types import LinearInputs


def linear_kernel(x: LinearInputs) -> ReferenceLinearAttention:
    """Plain torch's matmuls, the one backend so far; warns once per process on a GPU."""
    if x.v.is_cuda and x.v.dtype != torch.float64:
        _warn_of_matmuls()
    return ReferenceLinearAttention()


@cache
def _warn_of_matmuls() -> None:
    warnings.warn(
        "Gated linear attention runs on torch's own matmuls, chunk by chunk: there is no backend "
        "of fused kernels for it yet.",
        stacklevel=2,
    )
