"""What tokens and results move between the ranks of ep."""

from typing import Any

from torch import Tensor
from torch import distributed as dist

from dtcp.distributed.groups import group_of
from dtcp.distributed.moves import Moved

COUNT = 8
"""Bytes of a number of rows, int64."""


def counts_moves(
    index: Tensor, faults: Tensor, num_experts: int, num_ranks: int, group: str, *_: Any
) -> Moved:
    """Counts of rows for the experts of each other rank, and what is wrong."""
    # A number for each expert of the other rank, and what is wrong.
    size = (num_experts // num_ranks + faults.shape[0]) * COUNT
    return Moved.alike(size, num_ranks, dist.get_rank(group_of(group)))


def token_moves(
    x: Tensor, order: Tensor, place: Tensor, counts: Tensor, per_token: int, group: str
) -> Moved:
    """Tokens on their way to experts: rows by rank, as `counts` [2, n] of the host has them."""
    send, receive = counts.tolist()
    return moved_rows(x, send, receive, group)


def result_moves(rows: Tensor, order: Tensor, place: Tensor, counts: Tensor, group: str) -> Moved:
    """Results on their way home: the way of `token_moves` back."""
    send, receive = counts.tolist()
    return moved_rows(rows, receive, send, group)


def moved_rows(x: Tensor, send: list[int], receive: list[int], group: str) -> Moved:
    """Of rows of the width of x, so many to and from each rank."""
    return rows_moved(send, receive, x.shape[1] * x.element_size(), dist.get_rank(group_of(group)))


def rows_moved(send: list[int], receive: list[int], size: int, rank: int) -> Moved:
    """Of rows of so many bytes: they are laid in order before they leave and as they arrive."""
    held = (sum(send) + sum(receive)) * size
    return Moved.rows(send, receive, size, rank, workspace=held)
