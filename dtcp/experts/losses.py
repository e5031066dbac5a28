"""What keeps experts evenly loaded: losses over the routers of a whole batch.

The tokens of a batch lie on all ranks of dp and cp. A mean over those of one rank would be another
loss on every mesh: how often an expert was chosen is counted over all ranks, and each rank adds
its tokens' part. The parts sum to the loss of one device, and so do their gradients.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.collectives import all_gather


def balance_loss_share(
    probabilities: Tensor,
    index: Tensor,
    *,
    axis: DeviceMesh | None,
    real: Tensor | None = None,
) -> Tensor:
    """This rank's share of E * sum over experts of (how often chosen) * (mean probability).

    It is k where all experts are chosen alike, and grows with what routers prefer. The shares of
    all ranks of the axis sum to the loss over all their tokens.

    Args:
        probabilities: [N, E], of each expert for each token.
        index: [N, k] int64, the experts chosen.
        axis: the ranks whose tokens make up a batch, ParallelMesh.loss; None for this rank only,
            which on several is another loss.
        real: [N] bool, False for padding, which does not count.

    Traffic per rank: E + 1 numbers of each other rank, and none back. From Fedus et al. 2021,
    section 2.2, https://arxiv.org/abs/2101.03961
    """
    num_experts = probabilities.shape[1]
    mask = _ones_of(probabilities, real)
    # Whole numbers, which fp32 would round above 2^24 tokens.
    with torch.no_grad():
        rows = mask.to(torch.float64)[:, None].expand_as(index).reshape(-1)
        chosen = rows.new_zeros(num_experts).index_add(0, index.flatten(), rows)
        counts = _sum_over(torch.cat([chosen, mask.sum(dtype=torch.float64)[None]]), axis)
        tokens = counts[-1].clamp(min=1)
        frequency = (counts[:-1] / tokens / tokens).to(probabilities.dtype)
    return num_experts * (frequency * (probabilities * mask[:, None]).sum(0)).sum()


def z_loss_share(logits: Tensor, *, axis: DeviceMesh | None, real: Tensor | None = None) -> Tensor:
    """This rank's share of the mean of logsumexp(logits)^2, which keeps logits small.

    Args:
        logits: [N, E], of a router.
        axis, real: as of balance_loss_share.

    Traffic per rank: a number of each other rank, and none back. From Zoph et al. 2022, section
    3.2, https://arxiv.org/abs/2202.08906
    """
    mask = _ones_of(logits, real)
    tokens = _sum_over(mask.detach().sum(dtype=torch.float64)[None], axis).clamp(min=1)
    total = (logits.logsumexp(-1).square() * mask).sum()
    return total / tokens[0].to(total.dtype)


class RouterLoss(nn.Module):
    """Adds losses of a router to a training step, by way of gradients alone.

    The loss of a step stays that of its tokens, as every trainer computes it: what passes through
    here is handed on as it is, and brings the gradients of the router's losses along on the way
    back. So blocks may be compiled and recomputed, and the model returns what it always does.

    Args:
        balance, z: weights of balance_loss_share and z_loss_share; 0 leaves a loss out.
    """

    axis: DeviceMesh | None = None
    """The ranks whose tokens make up a batch, ParallelMesh.loss; `parallelize` sets it."""
    parts: int = 1
    """Micro-batches that make up a step: each adds its losses divided by it."""
    shares: Tensor
    """[2], of balance_loss_share and z_loss_share in the last forward pass in training."""

    def __init__(self, *, balance: float = 0.0, z: float = 0.0) -> None:
        super().__init__()
        if not (balance >= 0 and z >= 0):
            raise ValueError(
                f"A router's losses have weights from 0 on, got balance={balance}, z={z}: give 0 "
                f"to leave one out."
            )
        self.balance, self.z = balance, z
        self.register_buffer("shares", torch.zeros(2), persistent=False)

    def forward(
        self,
        weight: Tensor,
        *,
        logits: Tensor,
        probabilities: Tensor,
        index: Tensor,
        real: Tensor | None,
    ) -> Tensor:
        """The weight [N, k] of each chosen expert, as it is; other arguments as of the losses."""
        if not self.training or not (self.balance or self.z):
            return weight
        balance = z = weight.new_zeros((), dtype=probabilities.dtype)
        if self.balance:
            balance = balance_loss_share(probabilities, index, real=real, axis=self.axis)
        if self.z:
            z = z_loss_share(logits, real=real, axis=self.axis)
        # Read in forward, so that a graph computes them there, and not in backward once more.
        self.shares.copy_(torch.stack([balance, z]).detach())
        loss = (self.balance * balance + self.z * z) / self.parts
        return _BringGradient.apply(weight, loss)

    def reset_parameters(self) -> None:
        self.shares.zero_()

    def extra_repr(self) -> str:
        return f"balance={self.balance}, z={self.z}"


class _BringGradient(torch.autograd.Function):
    """x as it is; backward, the loss has the gradient of a loss of its own: one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (one,) = ctx.saved_tensors
        return grad, one


def _ones_of(x: Tensor, real: Tensor | None) -> Tensor:
    """[N], 1 for tokens and 0 for padding, in the dtype of x."""
    return x.new_ones(x.shape[0]) if real is None else real.to(x.dtype)


def _sum_over(x: Tensor, axis: DeviceMesh | None) -> Tensor:
    if axis is None or axis.size() == 1:
        return x
    return all_gather(x[None], axis, dim=0).sum(0)
