"""All-gather and reduce-scatter in two tiers: what a rank holds crosses once to each node.

    ranks 0 1 on a node, 2 3 on another
    between nodes     0 <-> 2     1 <-> 3       each with the rank of its own place
    inside            0 <-> 1     2 <-> 3       what both hold by then

The sums of a reduce-scatter are taken inside a node first, and one part for each node travels on.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.collectives import all_gather, move_rows, sum_dtype
from dtcp.distributed.counting import count_crossed
from dtcp.distributed.groups import group_name, group_of
from dtcp.distributed.moves import Moved
from dtcp.distributed.nodes import check_ranks_per_node
from dtcp.distributed.ops import communicating_op
from dtcp.sequence.arguments import check_dim, check_ints


def all_gather_on_nodes(x: Tensor, mesh: DeviceMesh, *, dim: int, ranks_per_node: int) -> Tensor:
    """`all_gather` where so many neighbours share a node: L to n * L, rank 0's first.

    Args:
        ranks_per_node: 0: nobody has said, and every rank sends to every other.

    Backward reduce-scatters in two tiers; what travels has been summed inside a node, in fp32.
    Traffic per rank: (n - 1) * x.numel() elements, of which n / ranks_per_node - 1 times
    x.numel() between nodes; and as much back.
    """
    check_dim("all_gather_on_nodes", x, dim)
    check_ints("all_gather_on_nodes", least=0, ranks_per_node=ranks_per_node)
    check_ranks_per_node("all_gather_on_nodes", mesh.size(), ranks_per_node)
    if ranks_per_node in (0, 1, mesh.size()):
        return all_gather(x, mesh, dim=dim)
    return _all_gather(x, dim % x.ndim, ranks_per_node, mesh.size(), group_name(mesh))


def gathered_on_nodes(size: int, num_ranks: int, rank: int, ranks_per_node: int) -> Moved:
    """What gathering `size` bytes of every rank moves for one of them; scattering, too.

    Args:
        ranks_per_node: 0 for one tier.
    """
    every = num_ranks * size
    if ranks_per_node in (0, 1, num_ranks):
        return Moved.alike(size, num_ranks, rank, workspace=every)
    between, inside = _peers(num_ranks, rank, ranks_per_node)
    rows = [b + i * (num_ranks // ranks_per_node) for b, i in zip(between, inside, strict=True)]
    return Moved.rows(rows, rows, size, rank, workspace=2 * every)


def _peers(n: int, rank: int, m: int) -> tuple[list[int], list[int]]:
    """1 for each rank of this one's place in another node, and 1 for each of its own node: [n]."""
    between = [int(peer % m == rank % m and peer != rank) for peer in range(n)]
    inside = [int(peer // m == rank // m and peer != rank) for peer in range(n)]
    return between, inside


def _moves(x: Tensor, dim: int, ranks_per_node: int, num_ranks: int, group: str) -> Moved:
    size, rank = x.nbytes, dist.get_rank(group_of(group))
    return gathered_on_nodes(size, num_ranks, rank, ranks_per_node)


def _scatter_moves(x: Tensor, dim: int, ranks_per_node: int, num_ranks: int, group: str) -> Moved:
    size, rank = x.numel() // num_ranks * x.element_size(), dist.get_rank(group_of(group))
    return gathered_on_nodes(size, num_ranks, rank, ranks_per_node)


@communicating_op("dtcp::all_gather_on_nodes", moves=_moves)
def _all_gather(x: Tensor, dim: int, ranks_per_node: int, num_ranks: int, group: str) -> Tensor:
    n, rank = num_ranks, dist.get_rank(group_of(group))
    m, place, node = ranks_per_node, rank % ranks_per_node, rank // ranks_per_node
    between, inside = _peers(n, rank, m)
    flat = x.reshape(1, -1)
    arrived = move_rows(flat.expand(n // m - 1, -1), between, between, group)
    # Of this place in every node.
    held = torch.cat((arrived[:node], flat, arrived[node:]))
    counts = [each * (n // m) for each in inside]
    others = move_rows(held.repeat(m - 1, 1), counts, counts, group).unflatten(0, (m - 1, n // m))
    _count("all_gather_on_nodes", x, between, counts, group, x.numel())
    by_place = torch.cat((others[:place], held[None], others[place:]))
    out = by_place.transpose(0, 1).reshape(n, *x.shape)
    return out.movedim(0, dim).flatten(dim, dim + 1).contiguous()


@communicating_op("dtcp::reduce_scatter_on_nodes", moves=_scatter_moves)
def _reduce_scatter(x: Tensor, dim: int, ranks_per_node: int, num_ranks: int, group: str) -> Tensor:
    n, rank = num_ranks, dist.get_rank(group_of(group))
    m, place, node = ranks_per_node, rank % ranks_per_node, rank // ranks_per_node
    between, inside = _peers(n, rank, m)
    parts = x.unflatten(dim, (n, -1)).movedim(dim, 0)  # [n, ...]
    by_place = parts.reshape(n // m, m, -1).transpose(0, 1)  # [m, nodes, ...]
    members = [member for member in range(m) if member != place]
    counts = [each * (n // m) for each in inside]
    of_node = move_rows(by_place[members].flatten(0, 1), counts, counts, group)
    own = by_place[place].to(sum_dtype(x))
    summed = (of_node.unflatten(0, (m - 1, n // m)).sum(0, dtype=own.dtype) + own).to(x.dtype)
    others = [other for other in range(n // m) if other != node]
    arrived = move_rows(summed[others], between, between, group)
    _count("reduce_scatter_on_nodes", x, between, counts, group, x.numel() // n)
    total = arrived.sum(0, dtype=own.dtype) + summed[node].to(own.dtype)
    return total.to(x.dtype).view(parts.shape[1:]).contiguous()


def _count(
    op: str, x: Tensor, between: list[int], inside: list[int], group: str, numel: int
) -> None:
    rows = [b + i for b, i in zip(between, inside, strict=True)]
    count_crossed(f"dtcp::{op}", group, rows, rows, size=numel * x.element_size())


@_all_gather.register_fake
def _(x: Tensor, dim: int, ranks_per_node: int, num_ranks: int, group: str) -> Tensor:
    return x.new_empty((*x.shape[:dim], num_ranks * x.shape[dim], *x.shape[dim + 1 :]))


@_reduce_scatter.register_fake
def _(x: Tensor, dim: int, ranks_per_node: int, num_ranks: int, group: str) -> Tensor:
    return x.new_empty((*x.shape[:dim], x.shape[dim] // num_ranks, *x.shape[dim + 1 :]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.args = inputs


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _reduce_scatter(grad, *ctx.args), None, None, None, None


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _all_gather(grad, *ctx.args), None, None, None, None


_all_gather.register_autograd(_gather_backward, setup_context=_keep)
_reduce_scatter.register_autograd(_scatter_backward, setup_context=_keep)
