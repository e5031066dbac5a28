"""Tokens to the ranks of their experts, and results home, as ops: exact for any routing.

Each choice of each token is a row. Rows leave sorted by expert, arrive by rank and then by
expert, and are sorted by expert once more; results go back the same way and lie down at their
choice. Nothing is dropped, nothing is added, and sums are taken at home, in the order of a token's
choices: results depend on no other token, and not on the number of ranks.

How many rows arrive depends on the routing, so `route_tokens` exchanges counts first and the host
waits for them, once per layer and forward pass: `all_to_all` takes its sizes from the host. The
number is a size without a value in a graph. Backward passes know the counts already.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from dtcp._torch.collectives import arrived, start_all_to_all
from dtcp.distributed.collectives import move_rows, sum_dtype
from dtcp.distributed.counting import count_crossed
from dtcp.distributed.groups import group_of
from dtcp.distributed.ops import communicating_op
from dtcp.distributed.staging import is_staged
from dtcp.experts.moves import counts_moves, result_moves, token_moves
from dtcp.local_op import local_op
from dtcp.metadata import HostTensor
from dtcp.sequence.host import on_device


class Routing(NamedTuple):
    """Where the rows of one batch of tokens go and come from; R rows arrive at this rank."""

    order: Tensor  # [N * k] int64, choices by expert; those that are not routed come last
    place: Tensor  # [R] int64, for each row, sorted by expert, its place among the arrivals
    ends: Tensor  # [E / n] int32, for each expert of this rank one past its last row
    counts: HostTensor  # [2, n] int64, rows to and from each rank
    faults: Tensor  # [M * n] int64, of all ranks, those of a node together


class ExchangeGroups(NamedTuple):
    """Who exchanges tokens, by the names of process groups."""

    num_ranks: int  # n, of `group`
    group: str  # of the ranks that have E / n experts each, the first rank the first ones
    shared_by: str = ""  # of ranks that hold the same tokens; each routes a part of them


def route_tokens(
    index: Tensor, faults: Tensor, *, num_experts: int, ranks: ExchangeGroups, refuse: bool = True
) -> Routing:
    """Exchange counts: how many rows each rank has for each expert.

    Args:
        index: [N, k] int64, the experts of each token; num_experts for a choice that is not routed.
        faults: [M] int64, what is wrong with the routing of this rank (M = 1), or of the rank that
            has its place in each of M nodes: 0, or NOT_FINITE and NO_EXPERT added up.
        refuse: leave faults to the exchange that follows if False.
    Raises:
        ValueError: on every rank of the group, where one has a fault.

    Traffic per rank: (n - 1) * (E / n + M) numbers of 8 bytes, each way. The host waits for it.
    """
    return Routing(*_route_tokens(index, faults, num_experts, *ranks, refuse))


def dispatch_tokens(x: Tensor, routing: Routing, *, per_token: int, group: str) -> Tensor:
    """Send each token to the experts it has chosen.

    Args:
        x: [N, D], or [N * k, D] with per_token=1.
        per_token: choices per row of x.
    Returns:
        [R, D], sorted by expert, then by rank, then by token.

    Backward brings the gradients home and sums those of a token, in fp32 at least. Traffic per
    rank: D elements per row to and from other ranks, and as much back.
    """
    return _dispatch_tokens(x, routing.order, routing.place, routing.counts, per_token, group)


def send_tokens(x: Tensor, routing: Routing, *, per_token: int, group: str) -> Tensor:
    """Start `dispatch_tokens`, which `receive_tokens` ends: what comes between overlaps with it.

    Returns:
        [R, D], on its way: for `receive_tokens` alone.

    Backward and traffic as of `dispatch_tokens`.
    """
    return _send_tokens(x, routing.order, routing.place, routing.counts, per_token, group)


def receive_tokens(flying: Tensor, routing: Routing) -> Tensor:
    """Wait for the tokens of `send_tokens`: [R, D], in the order of `dispatch_tokens`."""
    return _receive_tokens(flying, routing.place)


def combine_results(rows: Tensor, routing: Routing, *, group: str) -> Tensor:
    """Bring each result back to the token that asked for it.

    Args:
        rows: [R, D], in the order of `dispatch_tokens`.
    Returns:
        [N * k, D], a row per choice; zeros for those that were not routed.

    Backward sends the gradients to the experts. Traffic per rank: as of `dispatch_tokens`.
    """
    return _combine_results(rows, routing.order, routing.place, routing.counts, group)


@communicating_op("dtcp::route_tokens", moves=counts_moves)
def _route_tokens(
    index: Tensor,
    faults: Tensor,
    num_experts: int,
    num_ranks: int,
    group: str,
    shared_by: str,
    refuse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, nodes = num_ranks, len(faults)
    chosen = own_share(index, num_experts, shared_by).flatten()
    order = chosen.argsort(stable=True)
    experts = torch.arange(num_experts + 1, device=index.device)
    starts = torch.searchsorted(chosen[order], experts)
    # Faults travel with the counts, so that all ranks stop, and on the host costs no second wait.
    sent = torch.cat([starts.diff().view(n, -1), faults.expand(n, nodes)], dim=1)
    arrived = move_rows(sent, [1] * n, [1] * n, group)
    each = [sent[0].nbytes] * n
    count_crossed("dtcp::route_tokens", group, each, each)

    to_experts, from_ranks = sent[:, :-nodes], arrived[:, :-nodes]
    sums = torch.stack([to_experts.sum(1), from_ranks.sum(1), *arrived[:, -nodes:].T])
    summary = sums.cpu()
    counts, fault_counts = summary[:2].clone(), summary[2:].flatten()
    if refuse:
        _refuse_faults(fault_counts.tolist(), num_experts * nodes)
    expert = torch.arange(from_ranks.shape[1], device=index.device).repeat(n)
    of_row = expert.repeat_interleave(from_ranks.flatten(), output_size=int(counts[1].sum()))
    ends = from_ranks.sum(0).cumsum(0).to(torch.int32)
    return order, of_row.argsort(stable=True), ends, counts, on_device(fault_counts, index.device)


@_route_tokens.register_fake
def _(
    index: Tensor, faults: Tensor, num_experts: int, n: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arrivals = torch.library.get_ctx().new_dynamic_size()
    return (
        index.new_empty(index.numel()),
        index.new_empty(arrivals),
        index.new_empty(num_experts // n, dtype=torch.int32),
        torch.empty(2, n, dtype=torch.int64, device="cpu"),
        index.new_empty(n * faults.shape[0]),
    )


@communicating_op("dtcp::dispatch_tokens", moves=token_moves)
def _dispatch_tokens(
    x: Tensor, order: Tensor, place: Tensor, counts: Tensor, per_token: int, group: str
) -> Tensor:
    send, receive = counts.tolist()
    _count("dispatch_tokens", x, group, send, receive)
    rows = x[order[: sum(send)] // per_token]
    return move_rows(rows, receive, send, group)[place]


@communicating_op("dtcp::send_tokens", moves=token_moves)
def _send_tokens(
    x: Tensor, order: Tensor, place: Tensor, counts: Tensor, per_token: int, group: str
) -> Tensor:
    send, receive = counts.tolist()
    _count("send_tokens", x, group, send, receive)
    rows = x[order[: sum(send)] // per_token]
    if is_staged(rows, group_of(group)):
        # Over when it returns: what is there already is waited for in no time.
        return move_rows(rows, receive, send, group)
    return start_all_to_all(rows, receive, send, group)


@_dispatch_tokens.register_fake
@_send_tokens.register_fake
def _(x: Tensor, order: Tensor, place: Tensor, *_: Any) -> Tensor:
    return x.new_empty(place.shape[0], x.shape[1])


@local_op("dtcp::receive_tokens")
def _receive_tokens(flying: Tensor, place: Tensor) -> Tensor:
    return arrived(flying)[place]


@_receive_tokens.register_fake
def _(flying: Tensor, place: Tensor) -> Tensor:
    return flying.new_empty(place.shape[0], flying.shape[1])


@communicating_op("dtcp::combine_results", moves=result_moves)
def _combine_results(
    rows: Tensor, order: Tensor, place: Tensor, counts: Tensor, group: str
) -> Tensor:
    send, receive = counts.tolist()
    _count("combine_results", rows, group, receive, send)
    by_rank = torch.empty_like(rows, memory_format=torch.contiguous_format)
    by_rank.index_copy_(0, place, rows)
    arrived = move_rows(by_rank, send, receive, group)
    home = rows.new_zeros(len(order), rows.shape[1])
    return home.index_copy_(0, order[: len(arrived)], arrived)


@_combine_results.register_fake
def _(rows: Tensor, order: Tensor, place: Tensor, counts: Tensor, group: str) -> Tensor:
    return rows.new_empty(order.shape[0], rows.shape[1])


def _keep_way(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """All that is saved for backward is the way, none of the rows."""
    x, order, place, counts, ctx.per_token, ctx.group = inputs
    ctx.save_for_backward(order, place, counts)
    ctx.dtype = x.dtype


def _dispatch_tokens_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _summed_at_home(ctx, grad, *ctx.saved_tensors)


def _send_tokens_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    order, place, counts = ctx.saved_tensors
    # As they came, by rank: `receive_tokens` has put them back.
    in_order = torch.arange(grad.shape[0], device=grad.device)
    return _summed_at_home(ctx, grad, order, in_order, counts)


def _summed_at_home(
    ctx: Any, grad: Tensor, order: Tensor, place: Tensor, counts: Tensor
) -> tuple[Tensor | None, ...]:
    home = _combine_results(grad.contiguous(), order, place, counts, ctx.group)
    summed = home.unflatten(0, (-1, ctx.per_token)).sum(1, dtype=sum_dtype(home))
    return summed.to(ctx.dtype), None, None, None, None, None


def _keep_place(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _receive_tokens_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (place,) = ctx.saved_tensors
    return torch.zeros_like(grad).index_copy(0, place, grad), None


def _keep_way_home(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, order, place, counts, ctx.group = inputs
    ctx.save_for_backward(order, place, counts)


def _combine_results_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows = _dispatch_tokens(grad.contiguous(), *ctx.saved_tensors, 1, ctx.group)
    return rows, None, None, None, None


_dispatch_tokens.register_autograd(_dispatch_tokens_backward, setup_context=_keep_way)
_send_tokens.register_autograd(_send_tokens_backward, setup_context=_keep_way)
_receive_tokens.register_autograd(_receive_tokens_backward, setup_context=_keep_place)
_combine_results.register_autograd(_combine_results_backward, setup_context=_keep_way_home)


def own_share(index: Tensor, nowhere: int, shared_by: str) -> Tensor:
    """The choices of the tokens that this rank routes, of those that several ranks hold.

    Args:
        nowhere: the choice of the others.
    """
    if not shared_by:
        return index
    size, rank = dist.get_world_size(group_of(shared_by)), dist.get_rank(group_of(shared_by))
    mine = slice(len(index) * rank // size, len(index) * (rank + 1) // size)
    share = torch.full_like(index, nowhere)
    share[mine] = index[mine]
    return share


NOT_FINITE, NO_EXPERT = 1, 2
"""What may be wrong with a routing, as numbers that add up."""


def _refuse_faults(faults: list[int], num_experts: int) -> None:
    """Args: faults: of all ranks of ep, in their order."""
    for rank, fault in enumerate(faults):
        if fault & NOT_FINITE:
            raise ValueError(
                f"A routing weighs experts by finite numbers, got NaN or infinity on rank {rank} "
                f"of ep: lower the learning rate, or look at the tokens of this batch."
            )
        if fault:
            raise ValueError(
                f"A routing names experts by their numbers, got an index outside 0 to "
                f"{num_experts - 1} on rank {rank} of ep: correct the router."
            )


def _count(op: str, x: Tensor, group: str, send: list[int], receive: list[int]) -> None:
    count_crossed(f"dtcp::{op}", group, send, receive, size=x.shape[1] * x.element_size())
