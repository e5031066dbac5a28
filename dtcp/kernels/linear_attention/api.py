"""Gated linear attention on this rank's stretches of tokens: what strategies compute with.

Two backends give the same result: fla-core's kernels on a GPU for decays by head (Mamba-2), plain
torch elsewhere. On a GPU fla's are first compared with plain torch.
"""

from dtcp.kernels.delta_rule.self_test import fault_on_device
from dtcp.kernels.fla_support import refusal_of_fla, say_plain_torch
from dtcp.kernels.linear_attention.fla import FlaLinearAttention
from dtcp.kernels.linear_attention.reference import ReferenceLinearAttention
from dtcp.kernels.linear_attention.types import LinearInputs

LinearKernel = ReferenceLinearAttention | FlaLinearAttention


def linear_kernel(x: LinearInputs) -> LinearKernel:
    """fla's kernels where they run and take these decays, dtypes and widths, else plain torch."""
    if not x.v.is_cuda:
        return ReferenceLinearAttention()
    reason = _refusal(x) or fault_on_device(fla_linear_attention, ReferenceLinearAttention, x)
    if reason is None:
        return fla_linear_attention(x)
    say_plain_torch("gated linear attention", x.k.shape[-1], x.v.dtype, reason)
    return ReferenceLinearAttention()


def fla_linear_attention(x: LinearInputs) -> FlaLinearAttention:
    """fla's kernels, whatever their self-test says."""
    return FlaLinearAttention()


def _refusal(x: LinearInputs) -> str | None:
    if x.g.ndim == 4:
        return "of this rule take decays by head, not by channel"
    return refusal_of_fla(x.k, x.v)
