"""What lies just left of each segment: keys, and tokens to pool, in one exchange.

The two reach back differently far and differ in width, so they travel as flat messages, one a
peer. A reach longer than a shard takes tokens from several ranks, in the same exchange. Where
nodes are known and several ranks of one read the same tokens, a second exchange hands them on.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
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
from dtcp.sequence.node_routes import NodeRoutes, Reads, hands_on, node_routes
from dtcp.sequence.routes import Hop


def prepend_halo(x: Tensor, left: Tensor, segments: int) -> Tensor:
    """Put the tokens left of each segment before it: [B, L, D] -> [B, segments * (left + L'), D].

    Args:
        left: [B, segments * left, D], from `bring_left`.
    """
    parts = (left.unflatten(1, (segments, -1)), x.unflatten(1, (segments, -1)))
    return torch.cat(parts, dim=2).flatten(1, 2)


def halo_routes(
    layout: SequenceLayout, rank: int, left: Sequence[int], ranks_per_node: int = 0
) -> NodeRoutes:
    """Who sends which tokens to whom, for each of the reaches to the left.

    Args:
        ranks_per_node: neighbours that share a node; 0: one hop, straight from owner to reader.
    Returns:
        routes and onward, [reaches, 2 (send, receive), hops, 3] each.
    """
    segments = [layout.segments(other) for other in range(layout.num_shards)]
    starts = np.array([[start for start, _ in mine] for mine in segments], dtype=np.int64)
    ranks, index = (x.flatten() for x in np.indices(starts.shape))
    stop, n = starts.flatten(), layout.num_shards
    by_reach = []
    for reach in left:
        start = np.maximum(stop - reach, 0)
        reads = Reads(ranks, start, stop, (index + 1) * reach - (stop - start))
        nodes = ranks_per_node
        by_reach.append(
            node_routes(reads, layout.partition, rank, num_ranks=n, ranks_per_node=nodes)
        )
    return stacked(by_reach)


def stacked(routes: Sequence[NodeRoutes]) -> NodeRoutes:
    """Of as many hops each, some of them empty: [routes, 2, hops, 3]."""
    tables = []
    for each in zip(*routes, strict=True):
        hops = max(table.shape[1] for table in each)
        out = torch.zeros(len(each), 2, hops, 3, dtype=torch.int64)
        for filled, table in zip(out, each, strict=True):
            filled[:, : table.shape[1]] = table
        tables.append(out)
    return NodeRoutes(*tables)


def left_moved(
    routes: NodeRoutes, tokens: Sequence[int], num_ranks: int, rank: int, *, reverse: bool = False
) -> Moved:
    """What bringing the left tokens of each piece moves, with so many bytes per token of each."""
    counts = [[0] * num_ranks for _ in range(2)]
    for table in routes:
        for token, hops in zip(tokens, table.tolist(), strict=True):
            for sizes, way in zip(counts, reversed(hops) if reverse else hops, strict=True):
                for peer, start, stop in way:
                    sizes[peer] += (stop - start) * token
    sent, received = counts
    return Moved.rows(sent, received, 1, rank, workspace=sum(sent) + sum(received))


def _left_moves(
    pieces: Sequence[Tensor],
    routes: Tensor,
    onward: Tensor,
    lengths: Sequence[int],
    group: str,
    *,
    reverse: bool = False,
) -> Moved:
    place = dist.get_world_size(group_of(group)), dist.get_rank(group_of(group))
    tokens = [x.shape[0] * x.shape[2] * x.element_size() for x in pieces]
    return left_moved(NodeRoutes(routes, onward), tokens, *place, reverse=reverse)


@communicating_op("dtcp::bring_left", moves=_left_moves)
def bring_left(
    pieces: Sequence[Tensor], routes: Tensor, onward: Tensor, lengths: Sequence[int], group: str
) -> list[Tensor]:
    """Fetch tokens of pieces [B, L, D] of different widths in one exchange, two between nodes.

    Args:
        routes, onward: `NodeRoutes`, one a piece.
        lengths: tokens to fetch, a piece; those before the sequence are zero.
    Returns:
        [B, length, D] each.

    Backward sends the gradients home and sums them there; what the ranks of a node found is
    summed where the token came in. Traffic per rank: the tokens that other ranks hold, each way.
    """
    op, dtype = "dtcp::bring_left", pieces[0].dtype
    out = _zeros(pieces, lengths)
    send, receive = routes.unbind(1)
    _move(op, pieces, out, _Hops(send, receive, group, dtype))
    if hands_on(onward):
        send, receive = onward.unbind(1)
        _move(op, out, out, _Hops(send, receive, group, dtype), calls=0)
    return [x.to(dtype) for x in out]


@communicating_op("dtcp::bring_left_backward", moves=functools.partial(_left_moves, reverse=True))
def _return_grads(
    grads: Sequence[Tensor], routes: Tensor, onward: Tensor, lengths: Sequence[int], group: str
) -> list[Tensor]:
    op, dtype = "dtcp::bring_left_backward", grads[0].dtype
    sums: Sequence[Tensor] = grads
    if hands_on(onward):
        sums = [x.to(accumulation(dtype), copy=True) for x in grads]
        send, receive = onward.unbind(1)
        _move(op, sums, sums, _Hops(receive, send, group, dtype), calls=0)
    out = _zeros(grads, lengths)
    send, receive = routes.unbind(1)
    _move(op, sums, out, _Hops(receive, send, group, dtype))
    return [x.to(dtype) for x in out]


def _as_fetched(
    pieces: Sequence[Tensor], routes: Tensor, onward: Tensor, lengths: Sequence[int], group: str
) -> list[Tensor]:
    both = zip(pieces, lengths, strict=True)
    return [x.new_empty(x.shape[0], length, x.shape[2]) for x, length in both]


bring_left.register_fake(_as_fetched)
_return_grads.register_fake(_as_fetched)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    pieces, routes, onward, _, ctx.group = inputs
    ctx.lengths = [x.shape[1] for x in pieces]
    ctx.save_for_backward(routes, onward)


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    home = _return_grads(list(grads), *ctx.saved_tensors, ctx.lengths, ctx.group)
    return home, None, None, None, None


bring_left.register_autograd(_backward, setup_context=_keep)


class _Hops(NamedTuple):
    """One all_to_all: the hops of every piece, and the dtype in which tokens travel."""

    send: Tensor  # [pieces, hops, 3]
    receive: Tensor
    group: str
    dtype: torch.dtype


def _zeros(like: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """Room to sum tokens in, [B, length, D] each."""
    both = zip(like, lengths, strict=True)
    return [
        x.new_zeros((x.shape[0], length, x.shape[2]), dtype=accumulation(x.dtype))
        for x, length in both
    ]


def _move(
    op: str, pieces: Sequence[Tensor], out: Sequence[Tensor], hops: _Hops, *, calls: int = 1
) -> None:
    """Move slots of every piece to its peers, and add each to the slot where it lands in `out`."""
    n = dist.get_world_size(group_of(hops.group))
    send, receive = hops.send.tolist(), hops.receive.tolist()
    taken: list[list[Tensor]] = [[] for _ in range(n)]
    counts = [[0] * n, [0] * n]
    for x, to, back in zip(pieces, send, receive, strict=True):
        row = x.shape[0] * x.shape[2]
        for peer, start, stop in to:
            taken[peer].append(x[:, start:stop].reshape(-1).to(hops.dtype))
            counts[0][peer] += row * (stop - start)
        for peer, start, stop in back:
            counts[1][peer] += row * (stop - start)
    nothing = pieces[0].new_empty(0, dtype=hops.dtype)
    flat = torch.cat([part for parts in taken for part in parts] or [nothing])
    count_crossed(op, hops.group, *counts, size=flat.element_size(), calls=calls)
    _put(move_rows(flat, counts[1], counts[0], hops.group), receive, out, n)


def _put(
    arrived: Tensor, receive: Sequence[Sequence[Hop]], out: Sequence[Tensor], num_ranks: int
) -> None:
    """Add messages: peer after peer, in each piece after piece, hop after hop."""
    first = 0
    for rank in range(num_ranks):
        for x, hops in zip(out, receive, strict=True):
            for peer, start, stop in hops:
                if peer == rank and start < stop:
                    slots = x[:, start:stop]
                    slots += arrived[first : first + slots.numel()].view(slots.shape)
                    first += slots.numel()
