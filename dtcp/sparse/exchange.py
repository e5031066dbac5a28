"""What lies just left of each segment: keys, and tokens to pool, in one exchange.

The two reach back differently far and differ in width, so they travel as flat messages, one a
peer. A reach longer than a shard takes tokens from several ranks, in the same exchange.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from dtcp.distributed.collectives import move_rows
from dtcp.distributed.counting import count_crossed
from dtcp.distributed.groups import group_of
from dtcp.distributed.moves import Moved
from dtcp.distributed.ops import communicating_op
from dtcp.kernels.dtypes import accumulation
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.routes import Hop, Route, halo_runs


def prepend_halo(x: Tensor, left: Tensor, segments: int) -> Tensor:
    """Put the tokens left of each segment before it: [B, L, D] -> [B, segments * (left + L'), D].

    Args:
        left: [B, segments * left, D], from `bring_left`.
    """
    parts = (left.unflatten(1, (segments, -1)), x.unflatten(1, (segments, -1)))
    return torch.cat(parts, dim=2).flatten(1, 2)


def halo_routes(layout: SequenceLayout, rank: int, left: Sequence[int]) -> Tensor:
    """Who sends which tokens to whom, for each of the reaches to the left.

    Returns:
        [reaches, 2 (send, receive), hops, 3] int64: rank, and slots from and up to; as many hops
        on every rank, some of them empty.
    """
    routes_by_reach = [_all_routes(layout, reach) for reach in left]
    hops = max(len(part) for routes in routes_by_reach for route in routes for part in route)
    filled = [[_filled(part, hops) for part in routes[rank]] for routes in routes_by_reach]
    return torch.tensor(filled, dtype=torch.int64).view(len(left), 2, hops, 3)


@functools.lru_cache(maxsize=64)
def _all_routes(
    layout: SequenceLayout, left: int
) -> tuple[tuple[tuple[Hop, ...], tuple[Hop, ...]], ...]:
    """What each rank sends and receives."""
    ranks = range(layout.num_shards)
    held = [layout.runs(rank) for rank in ranks]
    wanted = [halo_runs(layout, rank, left=left, right=0) for rank in ranks]
    routes = [Route.between(held, wanted, rank) for rank in ranks]
    return tuple((route.send, route.receive) for route in routes)


def _filled(hops: Sequence[Hop], number: int) -> list[Hop]:
    return [*hops, *[(0, 0, 0)] * (number - len(hops))]


def left_moved(
    routes: Tensor, tokens: Sequence[int], num_ranks: int, rank: int, *, reverse: bool = False
) -> Moved:
    """What bringing the left tokens of each piece moves, with so many bytes a token of each."""
    counts = [[0] * num_ranks for _ in range(2)]
    for token, hops in zip(tokens, routes.tolist(), strict=True):
        for sizes, way in zip(counts, reversed(hops) if reverse else hops, strict=True):
            for peer, start, stop in way:
                sizes[peer] += (stop - start) * token
    sent, received = counts
    return Moved.rows(sent, received, 1, rank, workspace=sum(sent) + sum(received))


def _left_moves(
    pieces: Sequence[Tensor],
    routes: Tensor,
    lengths: Sequence[int],
    group: str,
    *,
    reverse: bool = False,
) -> Moved:
    place = dist.get_world_size(group_of(group)), dist.get_rank(group_of(group))
    tokens = [x.shape[0] * x.shape[2] * x.element_size() for x in pieces]
    return left_moved(routes, tokens, *place, reverse=reverse)


@communicating_op("dtcp::bring_left", moves=_left_moves)
def bring_left(
    pieces: Sequence[Tensor], routes: Tensor, lengths: Sequence[int], group: str
) -> list[Tensor]:
    """Fetch the tokens left of each segment of several tensors, in one all_to_all.

    Args:
        pieces: [B, L, D] each, of one dtype.
        routes: of `halo_routes`, one a piece.
        lengths: tokens to fetch, a piece; those before the sequence are zero.
    Returns:
        [B, length, D] each.

    Backward sends the gradients home and sums them there. Traffic per rank: the tokens that
    other ranks hold, each way.
    """
    send, receive = routes.unbind(1)
    shapes = [(x.shape[0], length, x.shape[2]) for x, length in zip(pieces, lengths, strict=True)]
    return _move("dtcp::bring_left", pieces, send.tolist(), receive.tolist(), shapes, group)


@bring_left.register_fake
def _(pieces: Sequence[Tensor], routes: Tensor, lengths: Sequence[int], group: str) -> list[Tensor]:
    both = zip(pieces, lengths, strict=True)
    return [x.new_empty(x.shape[0], length, x.shape[2]) for x, length in both]


@communicating_op("dtcp::bring_left_backward", moves=functools.partial(_left_moves, reverse=True))
def _return_grads(
    grads: Sequence[Tensor], routes: Tensor, lengths: Sequence[int], group: str
) -> list[Tensor]:
    send, receive = routes.unbind(1)
    shapes = [(x.shape[0], length, x.shape[2]) for x, length in zip(grads, lengths, strict=True)]
    op = "dtcp::bring_left_backward"
    return _move(op, grads, receive.tolist(), send.tolist(), shapes, group)


@_return_grads.register_fake
def _(grads: Sequence[Tensor], routes: Tensor, lengths: Sequence[int], group: str) -> list[Tensor]:
    both = zip(grads, lengths, strict=True)
    return [x.new_empty(x.shape[0], length, x.shape[2]) for x, length in both]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    pieces, routes, _, ctx.group = inputs
    ctx.lengths = [x.shape[1] for x in pieces]
    ctx.save_for_backward(routes)


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    (routes,) = ctx.saved_tensors
    return _return_grads(list(grads), routes, ctx.lengths, ctx.group), None, None, None


bring_left.register_autograd(_backward, setup_context=_keep)


def _move(
    op: str,
    pieces: Sequence[Tensor],
    send: Sequence[Sequence[Hop]],
    receive: Sequence[Sequence[Hop]],
    shapes: Sequence[tuple[int, int, int]],
    group: str,
) -> list[Tensor]:
    """Move slots of every piece to its peers; what lands on one slot is summed."""
    n = dist.get_world_size(group_of(group))
    taken: list[list[Tensor]] = [[] for _ in range(n)]
    counts = [[0] * n, [0] * n]
    for x, hops, back in zip(pieces, send, receive, strict=True):
        row = x.shape[0] * x.shape[2]
        for peer, start, stop in hops:
            taken[peer].append(x[:, start:stop].reshape(-1))
            counts[0][peer] += row * (stop - start)
        for peer, start, stop in back:
            counts[1][peer] += row * (stop - start)
    flat = torch.cat([part for parts in taken for part in parts] or [pieces[0].new_empty(0)])
    count_crossed(op, group, *counts, size=pieces[0].element_size())
    arrived = move_rows(flat, counts[1], counts[0], group)
    return _put(arrived, receive, shapes, n)


def _put(
    arrived: Tensor,
    receive: Sequence[Sequence[Hop]],
    shapes: Sequence[tuple[int, int, int]],
    num_ranks: int,
) -> list[Tensor]:
    """Lay messages out: peer after peer, in each piece after piece, hop after hop."""
    out = [arrived.new_zeros(shape, dtype=accumulation(arrived.dtype)) for shape in shapes]
    first = 0
    for rank in range(num_ranks):
        for x, hops in zip(out, receive, strict=True):
            for peer, start, stop in hops:
                if peer == rank and start < stop:
                    slots = x[:, start:stop]
                    slots += arrived[first : first + slots.numel()].view(slots.shape)
                    first += slots.numel()
    return [x.to(arrived.dtype) for x in out]
