"""The sum of the cross-entropies of a linear head's logits, by Liger's fused kernel.

Liger (https://github.com/linkedin/Liger-Kernel, 0.8.5) computes the logits of some tokens at a time
and makes their gradients at once, in forward: nothing is computed twice, as `dtcp.linear_logits`
does, which serves where Liger cannot.
"""

import importlib
import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

CHUNKED, LIGER = "chunked", "liger"
HEAD_KERNELS = ("auto", CHUNKED, LIGER)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

log = logging.getLogger("dtcp.kernels")


@dataclass(frozen=True)
class HeadDemand:
    """What a loss asks of a kernel.

    Args:
        dtypes: of hidden states and weight.
        sharded: whether the vocabulary is on several ranks.
        hidden_grad: whether hidden states have a gradient.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    sharded: bool
    hidden_grad: bool

    def why_not_liger(self) -> str:
        """What keeps Liger from it; nothing if it can."""
        if self.device != "cuda":
            return f"needs a GPU, not {self.device}"
        if self.sharded:
            return "needs a vocabulary that is whole on each rank"
        if len(set(self.dtypes)) > 1 or self.dtypes[0] not in _DTYPES:
            dtypes = ", ".join(f"{each}".removeprefix("torch.") for each in self.dtypes)
            return f"needs hidden states and weight of one dtype up to fp32, not {dtypes}"
        if not self.hidden_grad:
            return "gives no gradient of a weight whose hidden states have none"
        if find_spec("liger_kernel") is None:
            return "needs liger-kernel, which is not installed: pip install liger-kernel"
        return ""


@cache
def head_kernel(demand: HeadDemand, name: str) -> str:
    """The kernel that computes a loss of this kind, LIGER or CHUNKED; said once.

    Raises:
        ValueError: Liger is named and cannot, or no kernel has that name.
    """
    if name not in HEAD_KERNELS:
        raise ValueError(
            f"The loss of a linear head is computed by one of {', '.join(HEAD_KERNELS)}, got "
            f"kernel={name!r}: name one of them."
        )
    reason = demand.why_not_liger()
    if name == LIGER and reason:
        raise ValueError(
            f"The loss of a linear head is computed by a kernel that can, got kernel={LIGER!r}, "
            f"which {reason}: name 'auto' or {CHUNKED!r}."
        )
    chosen = CHUNKED if reason or name == CHUNKED else LIGER
    passed = f"; {LIGER} is passed over: it {reason}" if reason and name == "auto" else ""
    log.info("the loss of a linear head is computed by %s%s", chosen, passed)
    return chosen


def liger_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignored: int,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The sum of the losses of all tokens that have a label.

    A label outside of the vocabulary makes it inf: Liger would read beyond its logits.

    Args:
        hidden: [T, D].
        weight: [V, D]; its gradient is summed over chunks in fp32.
        bias: [V].
        labels: [T]; `ignored` where a token has no loss.
    Returns:
        A scalar, fp32. Forward waits for the device once, and so does backward: Liger's do.
    """
    functional = importlib.import_module("liger_kernel.transformers.functional")
    outside = ((labels < 0) | (labels >= len(weight))) & (labels != ignored)
    loss: Tensor = functional.liger_fused_linear_cross_entropy(
        hidden,
        weight,
        labels.masked_fill(outside, ignored),
        bias=bias,
        ignore_index=ignored,
        lse_square_scale=z_loss,
        label_smoothing=label_smoothing,
        reduction="sum",
        softcap=softcap or None,
        accum_dtype=torch.float32,
    )
    return loss + torch.where(outside.any(), torch.inf, 0.0)
