"""A tensor from one layout to another, to the whole sequence and back, or rolled by a token."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtcp.collectives import all_gather, check_shard, exchange
from dtcp.layout import SequenceLayout
from dtcp.route import Route, rolled


def shard(x: Tensor, layout: SequenceLayout, mesh: DeviceMesh, *, dim: int = 1) -> Tensor:
    """Keep this rank's tokens of a tensor that every rank holds whole: S to L.

    One tensor, of which each rank has a copy: so its gradient is that of all ranks' losses
    together, and every rank gets it whole.

    Backward all-gathers. Traffic per rank: none, and (n - 1) * L tokens back.
    """
    if layout.num_shards != mesh.size():
        raise ValueError(
            f"A layout has one shard a rank, got num_shards={layout.num_shards} on a mesh of "
            f"{mesh.size()} ranks: make the layout for this mesh."
        )
    local: Tensor = _Shard.apply(x, layout, mesh, dim)
    return local


def gather(x: Tensor, layout: SequenceLayout, mesh: DeviceMesh, *, dim: int = 1) -> Tensor:
    """Give every rank the whole sequence, in position order: L to S.

    The gradient is that of the sum of all ranks' losses: a loss that every rank computes alike
    from the whole counts n times, so divide it, or let each rank read its own part.

    Backward reduce-scatters. Traffic per rank: (n - 1) * L tokens, and as much back.
    """
    check_shard(x, layout, mesh, dim)
    return layout.restore(all_gather(x, mesh, dim=dim), dim=dim)


def relayout(
    x: Tensor, source: SequenceLayout, target: SequenceLayout, mesh: DeviceMesh, *, dim: int = 1
) -> Tensor:
    """Deal tokens anew: from the rank that holds them in source to the one that does in target.

    Args:
        x: L tokens at dim, laid out as source.
    Returns:
        L tokens at dim, laid out as target.

    Backward is the relayout from target to source. Traffic per rank: the tokens that change
    owner, each way.
    """
    if (source.seq_len, source.num_shards) != (target.seq_len, target.num_shards):
        raise ValueError(
            f"relayout deals the same tokens to the same ranks anew, got source={source}, "
            f"target={target}: make both layouts for one sequence and mesh."
        )
    check_shard(x, source, mesh, dim)
    ranks = range(mesh.size())
    held, wanted = ([layout.runs(rank) for rank in ranks] for layout in (source, target))
    return exchange(x, Route.between(held, wanted, mesh.get_local_rank()), mesh, dim=dim)


def roll(
    x: Tensor, layout: SequenceLayout, mesh: DeviceMesh, *, shift: int = -1, dim: int = 1
) -> Tensor:
    """Move every token `shift` positions along the sequence, as torch.roll would the whole.

    With -1 each position gets the next token, whichever rank holds it: what multi-token
    prediction reads. The first wraps around to the last position.

    Args:
        x: L tokens at dim.
    Returns:
        L tokens at dim, laid out as x.

    Backward rolls back. Traffic per rank: shift tokens a segment, each way.
    """
    check_shard(x, layout, mesh, dim)
    held = [layout.runs(rank) for rank in range(mesh.size())]
    wanted = [rolled(runs, shift, layout.seq_len) for runs in held]
    return exchange(x, Route.between(held, wanted, mesh.get_local_rank()), mesh, dim=dim)


class _Shard(torch.autograd.Function):
    """Not plain indexing: its gradient would be zero wherever other ranks' tokens are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: SequenceLayout, mesh: DeviceMesh, dim: int) -> Tensor:
        ctx.layout, ctx.mesh, ctx.dim = layout, mesh, dim
        return layout.shard(x, mesh.get_local_rank(), dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gather(grad, ctx.layout, ctx.mesh, dim=ctx.dim), None, None, None
