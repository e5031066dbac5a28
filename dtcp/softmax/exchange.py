"""Moving keys to the ranks that require them, and their gradients home.

The payload of a token travels as one row, in the model's dtype. A gradient travels as one
row per rank that used the key and is summed at home in fp32: a sum that travelled would be
rounded at every step (ring-flash-attention issue 42).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from dtcp.distributed.groups import group_of
from dtcp.distributed.staging import Between, Transfer, exchange, send_and_receive, start_exchange
from dtcp.softmax.metadata import KeyExchangeMetadata
from dtcp.softmax.row_transfers import (
    ChainedTransfer,
    CompletedTransfer,
    MoveRows,
    RowTransfer,
    StartRows,
)
from dtcp.softmax.strategy import OpContext


def accumulate_returned_grads(grads: Tensor, rows: Tensor, slots: Tensor) -> None:
    """Add the gradient rows [m, B, G, W] of some local slots to all slots' own: [B, L, G, W]."""
    grads.index_add_(1, slots, rows.transpose(0, 1).to(grads.dtype))


def accumulate_by_peer(sums: Tensor, rows: Tensor, places: Tensor, counts: Sequence[int]) -> None:
    """Add rows [m, ...] to sums [L, ...] at their places: each peer's in turn, in order of rank.

    A place is once among those of a peer. In one call with those of all a GPU would add them as
    they come, by atomics, and two runs of a step would differ in the last bits.

    Args:
        counts: rows of each peer.
    """
    parts = zip(counts, places.split(list(counts)), rows.split(list(counts)), strict=True)
    for count, at, part in parts:
        if count:
            sums.index_add_(0, at, part.to(sums.dtype))


def all_to_all_rows(
    rows: Tensor, send: list[int], receive: list[int], context: OpContext
) -> Tensor:
    """One all_to_all of rows, ordered by rank: [sum(send), ...] -> [sum(receive), ...]."""
    group = group_of(context.groups[-1])
    width = rows.shape[1:].numel()
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    if len(send) > 1:
        of_receive, of_send = ([count * width for count in each] for each in (receive, send))
        exchange(out.view(-1), rows.reshape(-1), group, receive=of_receive, send=of_send)
    size = width * rows.element_size()
    sent, received = ([count * size for count in counts] for counts in (send, receive))
    context.count(context.groups[-1], sent, received)
    return out


def isend_irecv(
    rows: Tensor, count: int, step: int, context: OpContext, *, tag: int = 0
) -> Transfer:
    """Send rows to the rank `step` places on and receive `count` rows from as far back.

    Ranks pair up, each on its own link, so no step waits for a neighbour to pass data on, and
    a rank gets just the rows it requires. Both ends know every size: an empty transfer is none.

    Args:
        step: may be negative, to send home what came `step` places.
        tag: tells apart transfers between the same two ranks.
    """
    group = group_of(context.groups[-1])
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    target, source = (dist.get_global_rank(group, (rank + s) % n) for s in (step, -step))
    transfer = send_and_receive(rows, count, Between(target, source, group, tag))
    counts = [[0] * n, [0] * n]
    for way, moved, by in zip(counts, (rows, transfer.arrived), (step, -step), strict=True):
        way[(rank + by) % n] = moved.nbytes
    context.count(context.groups[-1], *counts)
    return transfer


def start_all_to_all_rows(
    rows: Tensor, send: list[int], receive: list[int], context: OpContext
) -> Transfer:
    """`all_to_all_rows` on its way when this returns; all ranks start the same ones."""
    width = rows.shape[1:].numel() * rows.element_size()
    sent, received = ([count * width for count in counts] for counts in (send, receive))
    context.count(context.groups[-1], sent, received)
    group = group_of(context.groups[-1])
    return start_exchange(rows.contiguous(), group, receive=receive, send=send)


def start_bringing(
    rows: Tensor, send: list[int], receive: list[int], context: OpContext, start: StartRows
) -> RowTransfer:
    """Rows on their way from other groups; replicas fetch a part each, and gather them here."""
    replicas = context.replicas
    if replicas is None:
        return start(rows, send, receive)
    transfer = start(replicas.own(rows, send), replicas.shares(send), replicas.shares(receive))
    return ChainedTransfer(transfer, lambda own: replicas.gather(own, receive, _inside(context)))


def start_returning(
    rows: Tensor,
    send: list[int],
    receive: list[int],
    dtype: torch.dtype,
    context: OpContext,
    start: StartRows,
) -> RowTransfer:
    """Gradients of brought rows on their way home in a dtype; those of replicas are summed here."""
    replicas = context.replicas
    if replicas is None:
        return start(rows.to(dtype).contiguous(), send, receive)
    reduced = replicas.reduce(rows, send, dtype, _inside(context)).to(dtype)
    transfer = start(reduced, replicas.shares(send), replicas.shares(receive))
    return ChainedTransfer(transfer, lambda own: replicas.widen(own, receive))


def _inside(context: OpContext) -> MoveRows:
    inner = replace(context, groups=context.groups[1:2])
    return lambda rows, send, receive: all_to_all_rows(rows, send, receive, inner)


def _at_once(context: OpContext) -> StartRows:
    """A transfer that is over when it has started."""

    def start(rows: Tensor, send: list[int], receive: list[int]) -> RowTransfer:
        return CompletedTransfer(all_to_all_rows(rows, send, receive, context))

    return start


def bring_rows(packed: Tensor, metadata: KeyExchangeMetadata, context: OpContext) -> Tensor:
    """The rows that other ranks have sent here, in one hop or, between nodes, in two.

    Args:
        packed: rows of the local tokens `send_slot`, [m, B, G, W].
    Returns:
        what came in the first hop, then what came in the second.
    """
    send, receive = metadata.counts.tolist()
    rows = start_bringing(packed, send, receive, context, _at_once(context)).wait()
    if not metadata.onward_counts.numel():
        return rows
    send, receive = metadata.onward_counts.tolist()
    onward = rows.index_select(0, metadata.onward[: sum(send)])
    return torch.cat((rows, all_to_all_rows(onward, send, receive, context)))


def return_grads(
    rows: Tensor, metadata: KeyExchangeMetadata, dtype: torch.dtype, context: OpContext
) -> Tensor:
    """Gradients of rows in token order [K, B, G, W], summed on their owners: [B, L, G, W].

    In two hops, those of a node's readers are summed where the key came into the node.
    """
    length = metadata.own_keys
    by_source = torch.empty_like(rows).index_copy_(0, metadata.key_order.long(), rows)
    local = by_source[:length].transpose(0, 1).contiguous()
    send, receive = metadata.counts.tolist()
    brought = by_source[length : length + sum(receive)]
    if metadata.onward_counts.numel():
        on, arrived = metadata.onward_counts.tolist()
        further = by_source[length + sum(receive) :].to(dtype)
        of_node = all_to_all_rows(further, arrived, on, context)
        accumulate_by_peer(brought, of_node, metadata.onward[: sum(on)], on)
    start = _at_once(context)
    returned = start_returning(brought, receive, send, dtype, context, start).wait()
    slots = metadata.send_slot[: sum(send)]
    accumulate_by_peer(local.transpose(0, 1), returned, slots, send)
    return local
