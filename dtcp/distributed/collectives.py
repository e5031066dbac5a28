"""Collectives along one axis of a mesh: differentiable, traceable, counted.

Each is an op of our own, so that it is one node in a graph, runs to its end at every execution,
and counts its calls and the bytes that cross between ranks. Sums are taken in fp32 (in fp64
where given fp64), in the order of the ranks, so results do not depend on the backend.

All ranks of the mesh call the same collectives in the same order. A mesh of one rank
communicates nothing.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.collective_moves import (
    all_gather_moves,
    all_to_all_moves,
    exchange_moves,
    hops,
    reduce_scatter_moves,
    ring_shift_moves,
    token_width,
    tokens_by_rank,
)
from dtcp.distributed.counting import count_crossed
from dtcp.distributed.groups import gather_flat, group_name, group_of
from dtcp.distributed.ops import communicating_op
from dtcp.distributed.staging import exchange
from dtcp.sequence.arguments import check_dim, check_ints, check_tensor
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.routes import Route, halo_runs


def all_gather(x: Tensor, mesh: DeviceMesh, *, dim: int) -> Tensor:
    """Concatenate x of every rank along dim, rank 0's first: L to n * L.

    Backward reduce-scatters. Traffic per rank: (n - 1) * x.numel() elements, and as much back.
    """
    check_dim("all_gather", x, dim)
    return _all_gather(x, dim % x.ndim, mesh.size(), group_name(mesh))


def all_gather_over(x: Tensor, group: dist.ProcessGroup, *, dim: int) -> Tensor:
    """`all_gather` for a caller that has a process group and no mesh."""
    check_dim("all_gather", x, dim)
    return _all_gather(x, dim % x.ndim, group.size(), cast(str, group.group_name))


def reduce_scatter(x: Tensor, mesh: DeviceMesh, *, dim: int) -> Tensor:
    """Sum x over the ranks and keep this rank's part of dim: n * L to L.

    The summands travel unreduced and are added up here: a reduction on the way would round bf16
    at every step.

    Backward all-gathers. Traffic per rank: (n - 1) / n * x.numel() elements, and as much back.
    """
    check_dim("reduce_scatter", x, dim)
    if x.shape[dim] % mesh.size():
        raise ValueError(
            f"reduce_scatter gives every rank an equal part, got x.shape={tuple(x.shape)}, "
            f"dim={dim} on {mesh.size()} ranks: pad dim to a multiple of {mesh.size()}."
        )
    return _reduce_scatter(x, dim % x.ndim, mesh.size(), group_name(mesh))


def all_to_all(x: Tensor, mesh: DeviceMesh, *, receive: list[int], send: list[int]) -> Tensor:
    """Send rows to every rank: the first send[0] to rank 0, the next send[1] to rank 1, and so on.

    Args:
        x: [sum(send), ...].
        receive: rows from each rank; receive[q] on rank r is send[r] on rank q.
    Returns:
        [sum(receive), ...], rank 0's rows first.

    Backward sends every row's gradient back. Traffic per rank: the rows to and from others.
    """
    n = mesh.size()
    check_dim("all_to_all", x, 0)
    for counts in (send, receive):
        if not isinstance(counts, list):
            raise TypeError(
                f"all_to_all counts the rows of every rank, got send={send}, receive={receive}: "
                f"give a list of {n} each."
            )
        for count in counts:
            check_ints("all_to_all", least=0, rows=count)
    if len(send) != n or len(receive) != n or sum(send) != x.shape[0]:
        raise ValueError(
            f"all_to_all sends every row to one of {n} ranks, got x.shape={tuple(x.shape)}, "
            f"send={send}, receive={receive}: give {n} counts each, with sum(send) == x.shape[0]."
        )
    return _all_to_all(x, receive, send, group_name(mesh))


def ring_shift(x: Tensor, mesh: DeviceMesh, *, by: int = 1) -> Tensor:
    """Send x to the rank `by` places to the right, around the ring.

    Every rank sends and receives, so all ranks trace the same op. What wraps around to rank 0
    lies in its future; whoever reads it masks it by position.

    Args:
        x: any shape, the same on every rank.
    Returns:
        On rank r, x of rank (r - by) mod n.

    Backward shifts the gradient by -by. Traffic per rank: x.numel() elements each way.
    """
    check_tensor("ring_shift", x=x)
    check_ints("ring_shift", by=by)
    return _ring_shift(x, by, group_name(mesh))


def halo(
    x: Tensor, layout: SequenceLayout, mesh: DeviceMesh, *, left: int, right: int, dim: int = 1
) -> Tensor:
    """Bring the tokens next to each segment of this rank's shard, from whoever holds them.

    A layout's segments are its stretches of neighbouring positions: one per rank for
    Contiguous, two for HeadTail. A halo may reach across several ranks. Before the sequence and
    after it there is nothing: zeros, which nobody sends.

        Contiguous, S=8, n=2, left=2        rank 0: - -         rank 1: 2 3
        HeadTail, S=8, n=2, left=1          rank 0: - 5         rank 1: 1 3

    Args:
        x: L tokens at dim.
        left, right: tokens; the window that attends to W keys, its own among them, needs W - 1.
    Returns:
        L / segment_len * (left + right) tokens at dim: for each segment the left ones, then the
        right ones. `halo_token_indices` says which they are.

    Backward sends the gradients home and sums them there. Traffic per rank: those tokens that
    other ranks hold, and as much back.
    """
    check_ints("A halo", left=left, right=right)
    if left < 0 or right < 0:
        raise ValueError(
            f"A halo counts tokens on either side, got left={left}, right={right}: "
            f"give 0 for a side that is not read."
        )
    check_shard(x, layout, mesh, dim)
    ranks = range(layout.num_shards)
    held = [layout.runs(rank) for rank in ranks]
    wanted = [halo_runs(layout, rank, left=left, right=right) for rank in ranks]
    return exchange_tokens(x, Route.between(held, wanted, mesh.get_local_rank()), mesh, dim=dim)


def exchange_tokens(x: Tensor, route: Route, mesh: DeviceMesh, *, dim: int = 1) -> Tensor:
    """Send and receive tokens along a route, all in one all_to_all.

    Args:
        x: the tokens that this rank holds at dim.
    Returns:
        route.wanted_len tokens at dim.

    Backward goes the same way back; gradients of a token that went to several places are summed.
    Traffic per rank: the tokens to and from other ranks, each way.
    """
    check_dim("An exchange of tokens", x, dim)
    send = [number for hop in route.send for number in hop]
    receive = [number for hop in route.receive for number in hop]
    return _exchange_tokens(x, dim % x.ndim, route.wanted_len, send, receive, group_name(mesh))


def check_shard(x: Tensor, layout: SequenceLayout, mesh: DeviceMesh, dim: int) -> None:
    """Refuse a tensor that is not one of the layout's shards, or a layout of another mesh."""
    if not isinstance(layout, SequenceLayout):
        raise TypeError(
            f"A shard is one of a layout, got layout={layout!r}: give an instance, as "
            f"HeadTail(seq_len, mesh.size())."
        )
    check_dim("A layout", x, dim)
    if layout.num_shards != mesh.size() or x.shape[dim] != layout.shard_len:
        raise ValueError(
            f"A layout has a shard of {layout.shard_len} tokens for each of {layout.num_shards} "
            f"ranks, got x.shape={tuple(x.shape)}, dim={dim} on {mesh.size()} ranks: make the "
            f"layout for this mesh and sequence, or name the sequence's dim."
        )


@communicating_op("dtcp::all_gather", moves=all_gather_moves)
def _all_gather(x: Tensor, dim: int, num_ranks: int, group: str) -> Tensor:
    n = num_ranks
    _count("all_gather", x, [x.numel()] * n, [x.numel()] * n, group)
    if n == 1:
        return _copy(x)
    out = x.new_empty(n * x.numel())
    gather_flat(out, x.contiguous().view(-1), group=group_of(group))
    # Moving the ranks next to dim is where the data is copied, if dim is not the first.
    return out.view(n, *x.shape).movedim(0, dim).flatten(dim, dim + 1).contiguous()


@_all_gather.register_fake
def _(x: Tensor, dim: int, num_ranks: int, group: str) -> Tensor:
    return _resized(x, dim, x.shape[dim] * num_ranks)


@communicating_op("dtcp::reduce_scatter", moves=reduce_scatter_moves)
def _reduce_scatter(x: Tensor, dim: int, num_ranks: int, group: str) -> Tensor:
    n = num_ranks
    _count("reduce_scatter", x, [x.numel() // n] * n, [x.numel() // n] * n, group)
    if n == 1:
        return _copy(x)
    rows = x.movedim(dim, 0)
    length = rows.shape[0] // n
    arrived = move_rows(rows, [length] * n, [length] * n, group).unflatten(0, (n, length))
    return arrived.sum(0, dtype=sum_dtype(x)).to(x.dtype).movedim(0, dim).contiguous()


@_reduce_scatter.register_fake
def _(x: Tensor, dim: int, num_ranks: int, group: str) -> Tensor:
    return _resized(x, dim, x.shape[dim] // num_ranks)


@communicating_op("dtcp::all_to_all", moves=all_to_all_moves)
def _all_to_all(x: Tensor, receive: Sequence[int], send: Sequence[int], group: str) -> Tensor:
    width = token_width(x, 0)
    sent, received = ([width * count for count in counts] for counts in (send, receive))
    _count("all_to_all", x, sent, received, group)
    return move_rows(x, receive, send, group)


@_all_to_all.register_fake
def _(x: Tensor, receive: Sequence[int], send: Sequence[int], group: str) -> Tensor:
    return _resized(x, 0, sum(receive))


@communicating_op("dtcp::ring_shift", moves=ring_shift_moves)
def _ring_shift(x: Tensor, by: int, group: str) -> Tensor:
    n, rank = dist.get_world_size(group_of(group)), dist.get_rank(group_of(group))
    send, receive = [0] * n, [0] * n
    send[(rank + by) % n] = receive[(rank - by) % n] = x.numel()
    _count("ring_shift", x, send, receive, group)
    if by % n == 0:
        return _copy(x)
    return move_rows(x.reshape(-1), receive, send, group).view(x.shape)


@_ring_shift.register_fake
def _(x: Tensor, by: int, group: str) -> Tensor:
    return x.new_empty(x.shape)


@communicating_op("dtcp::exchange_tokens", moves=exchange_moves)
def _exchange_tokens(
    x: Tensor, dim: int, length: int, send: Sequence[int], receive: Sequence[int], group: str
) -> Tensor:
    """Move runs of dim between ranks; rows that land on one slot are summed.

    send and receive are hops, three ints each: rank, start, stop.
    """
    n = dist.get_world_size(group_of(group))
    counts = [tokens_by_rank(send, n), tokens_by_rank(receive, n)]
    width = token_width(x, dim)
    sent, received = ([width * count for count in tokens] for tokens in counts)
    _count("exchange_tokens", x, sent, received, group)
    taken = [x.narrow(dim, start, stop - start) for _, start, stop in hops(send)]
    rows = torch.cat([x.narrow(dim, 0, 0), *taken], dim=dim).movedim(dim, 0)
    return _place_rows(move_rows(rows, counts[1], counts[0], group), dim, length, receive)


@_exchange_tokens.register_fake
def _(x: Tensor, dim: int, length: int, *_: Any) -> Tensor:
    return _resized(x, dim, length)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """All that these ops save for backward is their arguments, none of the tensor's data."""
    x, *ctx.args = inputs
    ctx.shape = x.shape


def _all_gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _reduce_scatter(grad, *ctx.args), None, None, None


def _reduce_scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _all_gather(grad, *ctx.args), None, None, None


def _all_to_all_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    receive, send, group = ctx.args
    return _all_to_all(grad, send, receive, group), None, None, None


def _ring_shift_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    by, group = ctx.args
    return _ring_shift(grad, -by, group), None, None


def _exchange_tokens_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dim, _, send, receive, group = ctx.args
    home = _exchange_tokens(grad, dim, ctx.shape[dim], receive, send, group)
    return home, None, None, None, None, None


_all_gather.register_autograd(_all_gather_backward, setup_context=_keep)
_reduce_scatter.register_autograd(_reduce_scatter_backward, setup_context=_keep)
_all_to_all.register_autograd(_all_to_all_backward, setup_context=_keep)
_ring_shift.register_autograd(_ring_shift_backward, setup_context=_keep)
_exchange_tokens.register_autograd(_exchange_tokens_backward, setup_context=_keep)


def _count(op: str, x: Tensor, sent: Sequence[int], received: Sequence[int], group: str) -> None:
    """Count a call, and its elements of x's dtype to and from each rank of the group."""
    count_crossed(f"dtcp::{op}", group, sent, received, size=x.element_size())


def move_rows(x: Tensor, receive: Sequence[int], send: Sequence[int], group: str) -> Tensor:
    """One all_to_all of the rows of dim 0, as they are: new, contiguous memory."""
    if len(send) == 1:
        return _copy(x)
    out = x.new_empty(sum(receive), *x.shape[1:])
    exchange(out, x.contiguous(), group_of(group), receive=receive, send=send)
    return out


def _place_rows(rows: Tensor, dim: int, length: int, receive: Sequence[int]) -> Tensor:
    """Lay rows out at their slots of a dim of `length`, zero elsewhere."""
    runs = sorted((start, stop) for _, start, stop in hops(receive))
    collide = any(after[0] < before[1] for before, after in pairwise(runs))
    dtype = sum_dtype(rows) if collide else rows.dtype
    out = rows.new_zeros((length, *rows.shape[1:]), dtype=dtype).movedim(0, dim).contiguous()
    first = 0
    for _, start, stop in hops(receive):
        piece = rows[first : first + stop - start].movedim(0, dim)
        slots = out.narrow(dim, start, stop - start)
        if collide:
            slots.add_(piece)
        else:
            slots.copy_(piece)
        first += stop - start
    return out.to(rows.dtype)


def _resized(x: Tensor, dim: int, length: int | torch.SymInt) -> Tensor:
    return x.new_empty((*x.shape[:dim], length, *x.shape[dim + 1 :]))


def _copy(x: Tensor) -> Tensor:
    """A copy in contiguous memory: an op's output must not share memory with its input."""
    return x.clone(memory_format=torch.contiguous_format)


def sum_dtype(x: Tensor) -> torch.dtype:
    """In which gradients of several ranks are summed: fp32 for halves."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
