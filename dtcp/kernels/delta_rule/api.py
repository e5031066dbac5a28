"""The gated delta rule on this rank's stretches of tokens: what strategies compute with.

Two backends give the same result: fla-core's kernels on a GPU, plain torch elsewhere.
"""

import importlib.util
import warnings
from functools import cache

import torch

from dtcp.kernels.delta_rule.fla import FlaDeltaRule
from dtcp.kernels.delta_rule.fla_channel import FlaChannelDeltaRule
from dtcp.kernels.delta_rule.reference import ReferenceDeltaRule
from dtcp.kernels.delta_rule.types import Carry, DeltaGradients, DeltaInputs, DeltaKernel

__all__ = ["Carry", "DeltaGradients", "DeltaInputs", "DeltaKernel", "delta_kernel"]

WIDEST_KEY = 256
"""Key dim up to which fla has kernels."""


def delta_kernel(x: DeltaInputs) -> DeltaKernel:
    """fla's kernels where they run and take these dtypes and widths, else plain torch.

    Warns once per process where a GPU runs plain torch for want of a kernel.
    """
    if not x.v.is_cuda or x.v.dtype == torch.float64 or x.k.shape[-1] > WIDEST_KEY:
        return ReferenceDeltaRule()
    if torch.cuda.get_device_capability(x.v.device) < (8, 0) or not _has_fla():
        return ReferenceDeltaRule()
    return FlaDeltaRule() if x.g.ndim == 3 else FlaChannelDeltaRule()


@cache
def _has_fla() -> bool:
    """Whether fla is installed; warns if it is not."""
    installed = importlib.util.find_spec("fla") is not None
    if not installed:
        warnings.warn(
            "The gated delta rule runs on torch's own matmuls, which are slower on a GPU than "
            "fla-core's kernels: pip install fla-core.",
            stacklevel=2,
        )
    return installed
