"""Ranks of a node that read the same rows: each brings an even part, and they hand it on inside.

Where heads are dealt out in groups, neighbours may share a kv head and so read the same keys of
other groups. Of what comes from each of these a rank brings its part; the gradients of all are
summed in its place, in fp32, before they go home.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation

MoveRows = Callable[[Tensor, list[int], list[int]], Tensor]
"""One all_to_all of rows: those to send, how many to each rank, how many from each."""


class Arriving(Protocol):
    """Rows on their way."""

    def wait(self) -> Tensor: ...


@dataclass(frozen=True)
class Arrived:
    """Rows that are here."""

    rows: Tensor

    def wait(self) -> Tensor:
        return self.rows


@dataclass(frozen=True)
class Finished:
    """Rows on their way, and what becomes of them once they are here."""

    transfer: Arriving
    finish: Callable[[Tensor], Tensor]

    def wait(self) -> Tensor:
        return self.finish(self.transfer.wait())


@dataclass(frozen=True)
class Mates:
    """Of the ranks of a group, those of one node that attend with the same kv head.

    Args:
        num_ranks: of the group.
        rank: this one, among them.
        ranks: the mates, this one among them.
    """

    num_ranks: int
    rank: int
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, num_ranks: int, rank: int, per_node: int, copies: int) -> "Mates | None":
        """None where no rank of the group has others: no head is shared inside a node.

        Args:
            per_node: neighbours that share a node; 0: nobody has said.
            copies: neighbours that share a kv head.
        """
        if copies == 1 or min(per_node, num_ranks) < 2:
            return None
        return cls(num_ranks, rank, mates_of(rank, min(per_node, num_ranks), copies))

    def shares(self, counts: Sequence[int]) -> list[int]:
        """How many of so many rows from each of some ranks this one brings itself."""
        return [size_of(self._share(self.rank, count)) for count in counts]

    def own(self, rows: Tensor, counts: list[int]) -> Tensor:
        """What goes to this rank's like in other groups, of rows in parts of so many."""
        return torch.cat([x[self._share(self.rank, len(x))] for x in rows.split(counts)])

    def gather(self, rows: Tensor, counts: Sequence[int], move: MoveRows) -> Tensor:
        """All rows of all parts, of those that each mate has brought."""
        sent, received = self.inside(counts)
        arrived = move(rows.repeat(len(self.ranks) - 1, *[1] * (rows.ndim - 1)), sent, received)
        of_mate = dict(zip(self._others, arrived.split(self._of(received)), strict=True))
        of_mate[self.rank] = rows
        split = [of_mate[mate].split(self._sizes(mate, counts)) for mate in self.ranks]
        return torch.cat([x for part in zip(*split, strict=True) for x in part])

    def reduce(self, rows: Tensor, counts: list[int], dtype: torch.dtype, move: MoveRows) -> Tensor:
        """The mates' sums of what this rank has brought, of each one's gradients of all rows.

        Args:
            dtype: in which they travel; sums are taken in fp32 (fp64 for fp64).
        """
        received, sent = self.inside(counts)
        parts, wide = rows.split(counts), accumulation(dtype)
        taken = [[x[self._share(mate, len(x))] for x in parts] for mate in self._others]
        further = torch.cat([rows[:0], *(x for each in taken for x in each)])
        found = move(further.to(dtype), sent, received)
        own = self.own(rows, counts).to(wide)
        return own + found.view(len(self._others), *own.shape).sum(0, dtype=wide)

    def widen(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows at their places among all of their parts, zero where other mates bring them."""
        out = rows.new_zeros(sum(counts), *rows.shape[1:])
        parts = rows.split(self.shares(counts))
        for whole, part in zip(out.split(list(counts)), parts, strict=True):
            whole[self._share(self.rank, len(whole))] = part
        return out

    def inside(self, counts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Rows to and from each rank of the group, in `gather`."""
        sent, received = [0] * self.num_ranks, [0] * self.num_ranks
        own = sum(self.shares(counts))
        for mate in self._others:
            sent[mate], received[mate] = own, sum(self._sizes(mate, counts))
        return sent, received

    @property
    def _others(self) -> list[int]:
        return [mate for mate in self.ranks if mate != self.rank]

    def _of(self, counts: Sequence[int]) -> list[int]:
        return [counts[mate] for mate in self._others]

    def _sizes(self, mate: int, counts: Sequence[int]) -> list[int]:
        return [size_of(self._share(mate, count)) for count in counts]

    def _share(self, mate: int, count: int) -> slice:
        return even_share(self.ranks.index(mate), len(self.ranks), count)


def mates_of(rank: int, per_node: int, copies: int) -> tuple[int, ...]:
    """Who in a rank's node has its kv head, the rank among them."""
    first, head = rank // per_node * per_node, rank // copies
    return tuple(x for x in range(first, first + per_node) if x // copies == head)


def even_share(turn: int, count: int, length: int) -> slice:
    """One of `count` even parts of a length."""
    return slice(length * turn // count, length * (turn + 1) // count)


def size_of(part: slice) -> int:
    """Of a part as of `even_share`."""
    return int(part.stop - part.start)
