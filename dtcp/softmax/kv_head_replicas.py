"""Ranks of a node with a replica of one kv head: each fetches an even part, and they share it.

Where heads are split over groups of ranks, neighbours may attend with the same kv head and so read
the same keys of other groups. Of what comes from each of these a rank fetches its part, and the
parts are gathered inside the node; gradients are reduced there, in fp32, before they go home.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.softmax.row_transfers import MoveRows


@dataclass(frozen=True)
class KVHeadReplicas:
    """Of the ranks of a group, those of one node that attend with the same kv head.

    Args:
        num_ranks: of the group.
        rank: this one, among them.
        ranks: the replicas, this one among them.
    """

    num_ranks: int
    rank: int
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, num_ranks: int, rank: int, per_node: int, replicas: int) -> Self | None:
        """None where no rank of the group has others: no head is shared inside a node.

        Args:
            per_node: neighbours that share a node; 0: nobody has said.
            replicas: neighbours that share a kv head.
        """
        if replicas == 1 or min(per_node, num_ranks) < 2:
            return None
        return cls(num_ranks, rank, replica_ranks(rank, min(per_node, num_ranks), replicas))

    def shares(self, counts: Sequence[int]) -> list[int]:
        """How many of so many rows from each of some ranks this one fetches itself."""
        return [size_of(self._share(self.rank, count)) for count in counts]

    def own(self, rows: Tensor, counts: list[int]) -> Tensor:
        """What goes to this rank's like in other groups, of rows in parts of so many."""
        return torch.cat([x[self._share(self.rank, len(x))] for x in rows.split(counts)])

    def gather(self, rows: Tensor, counts: Sequence[int], move: MoveRows) -> Tensor:
        """All rows of all parts, of those that each replica has fetched."""
        sent, received = self.inside(counts)
        arrived = move(rows.repeat(len(self.ranks) - 1, *[1] * (rows.ndim - 1)), sent, received)
        of_peer = dict(zip(self._others, arrived.split(self._of(received)), strict=True))
        of_peer[self.rank] = rows
        split = [of_peer[peer].split(self._sizes(peer, counts)) for peer in self.ranks]
        return torch.cat([x for part in zip(*split, strict=True) for x in part])

    def reduce(self, rows: Tensor, counts: list[int], dtype: torch.dtype, move: MoveRows) -> Tensor:
        """The replicas' sums of what this rank has fetched, of each one's gradients of all rows.

        Args:
            dtype: in which they travel; sums are taken in fp32 (fp64 for fp64).
        """
        received, sent = self.inside(counts)
        parts, wide = rows.split(counts), accumulation(dtype)
        taken = [[x[self._share(peer, len(x))] for x in parts] for peer in self._others]
        further = torch.cat([rows[:0], *(x for each in taken for x in each)])
        received_rows = move(further.to(dtype), sent, received)
        own = self.own(rows, counts).to(wide)
        return own + received_rows.view(len(self._others), *own.shape).sum(0, dtype=wide)

    def widen(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows at their places among all of their parts, zero where other replicas fetch them."""
        out = rows.new_zeros(sum(counts), *rows.shape[1:])
        parts = rows.split(self.shares(counts))
        for whole, part in zip(out.split(list(counts)), parts, strict=True):
            whole[self._share(self.rank, len(whole))] = part
        return out

    def inside(self, counts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Rows to and from each rank of the group, in `gather`."""
        sent, received = [0] * self.num_ranks, [0] * self.num_ranks
        own = sum(self.shares(counts))
        for peer in self._others:
            sent[peer], received[peer] = own, sum(self._sizes(peer, counts))
        return sent, received

    @property
    def _others(self) -> list[int]:
        return [peer for peer in self.ranks if peer != self.rank]

    def _of(self, counts: Sequence[int]) -> list[int]:
        return [counts[peer] for peer in self._others]

    def _sizes(self, peer: int, counts: Sequence[int]) -> list[int]:
        return [size_of(self._share(peer, count)) for count in counts]

    def _share(self, peer: int, count: int) -> slice:
        return even_share(self.ranks.index(peer), len(self.ranks), count)


def replica_ranks(rank: int, per_node: int, replicas: int) -> tuple[int, ...]:
    """Who in a rank's node has its kv head, the rank among them."""
    first, head = rank // per_node * per_node, rank // replicas
    return tuple(x for x in range(first, first + per_node) if x // replicas == head)


def even_share(turn: int, count: int, length: int) -> slice:
    """One of `count` even parts of a length."""
    return slice(length * turn // count, length * (turn + 1) // count)


def size_of(part: slice) -> int:
    """Of a part as of `even_share`."""
    return int(part.stop - part.start)
