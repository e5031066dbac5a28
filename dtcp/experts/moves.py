"""What tokens and results move between the ranks of ep."""

from torch import Tensor
from torch import distributed as dist

from dtcp.distributed.groups import group_of
from dtcp.distributed.moves import Moved

COUNT = 8
"""Bytes of a number of rows, int64."""


def counts_moves(
    index: Tensor, weight: Tensor, num_experts: int, group: str, shared_by: str
) -> Moved:
    n, rank = dist.get_world_size(group_of(group)), dist.get_rank(group_of(group))
    # A number for each expert of the other rank, and one for what is wrong.
    return Moved.alike((num_experts // n + 1) * COUNT, n, rank)


def token_moves(
    x: Tensor, order: Tensor, place: Tensor, counts: Tensor, per_token: int, group: str
) -> Moved:
    send, receive = counts.tolist()
    return _rows(x, send, receive, group)


def result_moves(rows: Tensor, order: Tensor, place: Tensor, counts: Tensor, group: str) -> Moved:
    send, receive = counts.tolist()
    return _rows(rows, receive, send, group)


def _rows(x: Tensor, send: list[int], receive: list[int], group: str) -> Moved:
    size = x.shape[1] * x.element_size()
    held = (sum(send) + sum(receive)) * size
    return Moved.rows(send, receive, size, dist.get_rank(group_of(group)), workspace=held)
