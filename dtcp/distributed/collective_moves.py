"""What the collectives move, from the sizes of their arguments."""

from collections.abc import Sequence
from math import prod

from torch import Tensor
from torch import distributed as dist

from dtcp.distributed.groups import group_of
from dtcp.distributed.moves import Moved


def all_gather_moves(x: Tensor, dim: int, num_ranks: int, group: str) -> Moved:
    """x goes to each other rank."""
    return Moved.alike(x.nbytes, *_place(group))


def reduce_scatter_moves(x: Tensor, dim: int, num_ranks: int, group: str) -> Moved:
    """The n-th part of x goes to each other rank; all of x is laid in order first."""
    n, rank = _place(group)
    return Moved.alike(x.numel() // n * x.element_size(), n, rank, workspace=x.nbytes)


def all_to_all_moves(x: Tensor, receive: Sequence[int], send: Sequence[int], group: str) -> Moved:
    """Rows of x, so many to and from each rank."""
    return Moved.rows(send, receive, token_width(x, 0) * x.element_size(), _place(group)[1])


def ring_shift_moves(x: Tensor, by: int, group: str) -> Moved:
    """x goes to the rank `by` places on."""
    n, rank = _place(group)
    sent, received = ([int(peer == (rank + way) % n) for peer in range(n)] for way in (by, -by))
    return Moved.rows(sent, received, x.nbytes, rank)


def exchange_moves(
    x: Tensor, dim: int, length: int, send: Sequence[int], receive: Sequence[int], group: str
) -> Moved:
    """Tokens of x along dim, as the hops of both sides say; packed before they leave."""
    n, rank = _place(group)
    size = token_width(x, dim) * x.element_size()
    sent, received = (tokens_by_rank(x_hops, n) for x_hops in (send, receive))
    held = (sum(sent) + sum(received)) * size
    return Moved.rows(sent, received, size, rank, workspace=held)


def hops(numbers: Sequence[int]) -> list[tuple[int, int, int]]:
    """(rank, start, stop) of each, of numbers behind one another."""
    return list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))


def tokens_by_rank(numbers: Sequence[int], num_ranks: int) -> list[int]:
    """Tokens to or from each rank."""
    tokens = [0] * num_ranks
    for rank, start, stop in hops(numbers):
        tokens[rank] += stop - start
    return tokens


def token_width(x: Tensor, dim: int) -> int:
    """Elements of one token, where there may be no token."""
    return prod(x.shape[:dim]) * prod(x.shape[dim + 1 :])


def _place(group: str) -> tuple[int, int]:
    """(ranks of the group, this one's rank)."""
    return dist.get_world_size(group_of(group)), dist.get_rank(group_of(group))
