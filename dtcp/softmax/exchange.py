"""Moving keys to the ranks that require them, and their gradients home.

The payload of a token travels as one row, in the model's dtype. A gradient travels as one
row per rank that used the key and is summed at home in fp32: a sum that travelled would be
rounded at every step (ring-flash-attention issue 42).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dtcp.distributed.groups import group_of
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
        dist.all_to_all_single(
            out.view(-1),
            rows.reshape(-1),
            [count * width for count in receive],
            [count * width for count in send],
            group=group,
        )
    size = width * rows.element_size()
    context.count(sent=sum(send) * size, received=sum(receive) * size)
    return out


@dataclass
class Transfer:
    """A transfer in flight; `wait` gives what arrived."""

    arrived: Tensor
    works: list[dist.Work]
    held: Tensor  # the sent rows, kept alive until the transfer is over

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.arrived


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
    arrived = rows.new_empty(count, *rows.shape[1:])
    target, source = (dist.get_global_rank(group, (rank + s) % n) for s in (step, -step))
    moves = []
    if rows.shape[0]:
        moves.append(dist.P2POp(dist.isend, rows, target, group, tag))
    if count:
        moves.append(dist.P2POp(dist.irecv, arrived, source, group, tag))
    works = dist.batch_isend_irecv(moves) if moves else []
    context.count(
        sent=rows.numel() * rows.element_size(),
        received=arrived.numel() * arrived.element_size(),
    )
    return Transfer(arrived, works, rows)


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
