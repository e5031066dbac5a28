"""Collectives for a loss that every rank computes alike: their gradient is not summed over ranks.

A gradient that is the same on every rank would be summed to n times itself by the backward of the
usual collectives. Here each rank keeps what belongs to its own tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed import relayout
from dtcp.distributed.collectives import all_gather
from dtcp.sequence.layout import SequenceLayout


def gather_for_replicated_loss(
    x: Tensor, layout: SequenceLayout, mesh: DeviceMesh, *, dim: int
) -> Tensor:
    """The parts of all ranks in the order of the row.

    Traffic per rank: forward, (n - 1) * L tokens.
    """
    return _Gather.apply(x, layout, mesh, dim)


def sum_for_replicated_loss(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of x over all ranks, in the order of the ranks.

    Traffic per rank: forward, (n - 1) * x.numel() elements.
    """
    return _Sum.apply(x, mesh)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: SequenceLayout, mesh: DeviceMesh, dim: int) -> Tensor:
        ctx.layout, ctx.rank, ctx.dim = layout, mesh.get_local_rank(), dim
        return relayout.gather(x, layout, mesh, dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.layout.shard(grad, ctx.rank, dim=ctx.dim), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        return all_gather(x[None], mesh, dim=0).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
