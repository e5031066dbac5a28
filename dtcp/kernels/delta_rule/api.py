"""The gated delta rule on this rank's stretches of tokens: what strategies compute with.

Two backends give the same result: fla-core's kernels on a GPU, plain torch elsewhere. On a GPU
fla's are first compared with plain torch. Where plain torch runs there, a warning says once why.
"""

import importlib.util
import logging
from functools import cache

import torch

from dtcp.kernels.delta_rule.fla import FlaDeltaRule
from dtcp.kernels.delta_rule.fla_channel import FlaChannelDeltaRule
from dtcp.kernels.delta_rule.reference import ReferenceDeltaRule
from dtcp.kernels.delta_rule.self_test import fault_of_delta_rule
from dtcp.kernels.delta_rule.types import Carry, DeltaGradients, DeltaInputs, DeltaKernel

__all__ = ["Carry", "DeltaGradients", "DeltaInputs", "DeltaKernel", "delta_kernel", "fla_kernel"]

LOG = logging.getLogger("dtcp.kernels")
WIDEST_KEY = 256
"""Key dim up to which fla has kernels."""


def delta_kernel(x: DeltaInputs) -> DeltaKernel:
    """fla's kernels where they run and take these dtypes and widths, else plain torch."""
    if not x.v.is_cuda:
        return ReferenceDeltaRule()
    reason = refusal_of_fla(x) or _fault_of(x)
    if reason is None:
        return fla_kernel(x)
    _say_plain_torch(x.k.shape[-1], x.v.dtype, reason)
    return ReferenceDeltaRule()


def fla_kernel(x: DeltaInputs) -> DeltaKernel:
    """fla's kernels for these decays, whatever their self-test says."""
    return FlaDeltaRule() if x.g.ndim == 3 else FlaChannelDeltaRule()


def refusal_of_fla(x: DeltaInputs) -> str | None:
    """What of these tensors on a GPU fla's kernels do not do; None if they do all."""
    if x.v.dtype == torch.float64:
        return "do not compute in fp64"
    if x.k.shape[-1] > WIDEST_KEY:
        return f"take keys of at most {WIDEST_KEY}"
    if torch.cuda.get_device_capability(x.v.device) < (8, 0):
        return "run on GPUs from Ampere on"
    if not _has_fla():
        return "are not installed: pip install fla-core"
    return None


@cache
def _has_fla() -> bool:
    return importlib.util.find_spec("fla") is not None


def _fault_of(x: DeltaInputs) -> str | None:
    """What is wrong with their results on this device, found at their first use."""
    sizes = tuple((tuple(part.shape[2:]), part.dtype) for part in x)
    return _fault(sizes, x.v.device)


@cache
def _fault(
    sizes: tuple[tuple[tuple[int, ...], torch.dtype], ...], device: torch.device
) -> str | None:
    like = DeltaInputs(
        *(torch.empty(1, 1, *size, dtype=dtype, device=device) for size, dtype in sizes)
    )
    return fault_of_delta_rule(lambda: fla_kernel(like), ReferenceDeltaRule(), like)


@cache
def _say_plain_torch(width: int, dtype: torch.dtype, reason: str) -> None:
    LOG.warning(
        "the delta rule (keys of %d, %s) is computed by plain torch, slower on a GPU: fla-core's "
        "kernels %s",
        width,
        str(dtype).removeprefix("torch."),
        reason,
    )
