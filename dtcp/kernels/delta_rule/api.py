"""The gated delta rule on this rank's stretches of tokens: what strategies compute with.

Two backends give the same result: fla-core's kernels on a GPU, plain torch elsewhere. On a GPU
fla's are first compared with plain torch. Where plain torch runs there, the log says once why.
"""

from dtcp.kernels.delta_rule.fla import FlaDeltaRule
from dtcp.kernels.delta_rule.fla_channel import FlaChannelDeltaRule
from dtcp.kernels.delta_rule.reference import ReferenceDeltaRule
from dtcp.kernels.delta_rule.self_test import fault_on_device
from dtcp.kernels.delta_rule.types import Carry, DeltaGradients, DeltaInputs, DeltaKernel
from dtcp.kernels.fla_support import refusal_of_fla, say_plain_torch

__all__ = [
    "Carry",
    "DeltaGradients",
    "DeltaInputs",
    "DeltaKernel",
    "delta_kernel",
    "fla_delta_rule",
]


def delta_kernel(x: DeltaInputs) -> DeltaKernel:
    """fla's kernels where they run and take these dtypes and widths, else plain torch."""
    if not x.v.is_cuda:
        return ReferenceDeltaRule()
    reason = refusal_of_fla(x.k, x.v) or fault_on_device(fla_delta_rule, ReferenceDeltaRule, x)
    if reason is None:
        return fla_delta_rule(x)
    say_plain_torch("the delta rule", x.k.shape[-1], x.v.dtype, reason)
    return ReferenceDeltaRule()


def fla_delta_rule(x: DeltaInputs) -> DeltaKernel:
    """fla's kernels for these decays, whatever their self-test says."""
    return FlaDeltaRule() if x.g.ndim == 3 else FlaChannelDeltaRule()
