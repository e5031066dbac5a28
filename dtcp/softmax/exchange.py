"""Moving keys to the ranks that require them, and their gradients home.

The payload of a token travels as one row, in the model's dtype. A gradient travels as one
row per rank that used the key and is summed at home in fp32: a sum that travelled would be
rounded at every step (ring-flash-attention issue 42).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from dtcp.distributed.groups import group_of
from dtcp.distributed.staging import Between, Transfer, exchange, send_and_receive
from dtcp.softmax.metadata import KeyExchangeMetadata
from dtcp.softmax.op import OpContext


def accumulate_returned_grads(grads: Tensor, rows: Tensor, slots: Tensor) -> None:
    """Add the gradient rows [m, B, G, W] of some local slots to all slots' own: [B, L, G, W]."""
    grads.index_add_(1, slots, rows.transpose(0, 1).to(grads.dtype))


def all_to_all_rows(
    rows: Tensor, send: list[int], receive: list[int], context: OpContext
) -> Tensor:
    """One all_to_all of rows, ordered by rank: [sum(send), ...] -> [sum(receive), ...]."""
    group = group_of(context.groups[-1])
    width = rows[:1].numel() if rows.shape[0] else rows.new_empty(1, *rows.shape[1:]).numel()
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    if len(send) > 1:
        of_receive, of_send = ([count * width for count in each] for each in (receive, send))
        exchange(out.view(-1), rows.reshape(-1), group, receive=of_receive, send=of_send)
    size = width * rows.element_size()
    context.count(sent=sum(send) * size, received=sum(receive) * size)
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
    size = rows.element_size()
    context.count(sent=rows.numel() * size, received=transfer.arrived.numel() * size)
    return transfer


def sort_by_index(metadata: KeyExchangeMetadata, length: int) -> Tensor:
    """Where each key in token order comes from: the local ones [L], then the received ones."""
    return metadata.order[: length + int(metadata.counts[1].sum())]


def return_grads(
    rows: Tensor,
    metadata: KeyExchangeMetadata,
    length: int,
    dtype: torch.dtype,
    context: OpContext,
) -> Tensor:
    """Gradients of rows in token order [K, B, G, W], summed on their owners: [B, L, G, W]."""
    by_source = torch.empty_like(rows).index_copy_(0, sort_by_index(metadata, length).long(), rows)
    local = by_source[:length].transpose(0, 1).contiguous()
    send, receive = metadata.counts.tolist()
    returned = all_to_all_rows(by_source[length:].to(dtype), receive, send, context)
    accumulate_returned_grads(local, returned, metadata.send_slot[: sum(send)])
    return local
