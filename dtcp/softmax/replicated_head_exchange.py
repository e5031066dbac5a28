"""Kv heads that several ranks of a node attend with: they cross to it once, and are spread inside.

Where there are fewer kv heads than ranks, neighbours share one. Of the keys of another node each
of them takes in an even part, and hands it on to those of its node that share the head; what they
find as gradients is summed where the key came in, in fp32, and goes home once.

    4 ranks as 2 nodes, one kv head, rank 0 holds tokens 0-7
    first hop      0 -> 1: 0-7     0 -> 2: 0-3     0 -> 3: 4-7
    second hop     2 -> 3: 0-3     3 -> 2: 4-7
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dtcp.distributed.moves import Moved
from dtcp.kernels.dtypes import accumulation
from dtcp.softmax.kv_head_replicas import even_share, replica_ranks, size_of
from dtcp.softmax.row_transfers import MoveRows


@dataclass(frozen=True)
class ReplicatedHeadExchange:
    """The ranks of a group that deals heads out, as one of them sees them.

    Args:
        num_ranks: of the group.
        per_node: of them, neighbours that share a node.
        replicas: neighbours that share a kv head.
    """

    num_ranks: int
    rank: int
    per_node: int
    replicas: int

    @classmethod
    def of(cls, num_ranks: int, rank: int, per_node: int, replicas: int) -> Self | None:
        """None where no key crosses twice: no head is shared, or there is one node, or none."""
        crosses = 1 < per_node < num_ranks
        return cls(num_ranks, rank, per_node, replicas) if crosses and replicas > 1 else None

    def to_sequence(self, parts: Sequence[Tensor], move: MoveRows) -> list[Tensor]:
        """Local keys and values [B, L, G, W] of all heads to those of all ranks, of one head.

        Returns:
            [n, B, L, 1, W] each, by owner.
        """
        rows = torch.cat(list(parts), dim=-1).permute(2, 1, 0, 3)  # [G, L, B, W]
        length, replicas = rows.shape[1], self._replicas(self.rank)
        to = [rows[peer // self.replicas][self._goes(peer, length)] for peer in self._all]
        sent, received = self._first_hop(length)
        by_owner = move(torch.cat(to), sent, received).split(received)
        brought = torch.stack([by_owner[peer] for peer in self._far])  # [far, share, B, W]
        sent, received = self._second_hop(length)
        others = self._others(replicas)
        own = brought.flatten(0, 1)
        arrived = move(own.repeat(len(others), 1, 1), sent, received)
        of_peer = dict(zip(others, arrived.split([received[peer] for peer in others]), strict=True))
        of_peer[self.rank] = own
        # Of each replica, its share of every owner's tokens.
        each = [x.view(len(self._far), -1, *rows.shape[2:]) for x in (of_peer[m] for m in replicas)]
        whole = iter(torch.cat(each, dim=1))
        out = [by_owner[peer] if self._near(peer) else next(whole) for peer in self._all]
        split = torch.stack(out).transpose(1, 2).split([x.shape[-1] for x in parts], dim=-1)
        return [x.unsqueeze(3) for x in split]

    def home(
        self, parts: Sequence[Tensor], kv_heads: int, dtype: torch.dtype, move: MoveRows
    ) -> list[Tensor]:
        """The gradients [n, B, L, 1, W] of `to_sequence`, summed at their owners: [B, L, G, W].

        Args:
            dtype: in which they travel; sums are taken in fp32 (fp64 for fp64).
        """
        rows = torch.cat([x.squeeze(3) for x in parts], dim=-1).transpose(1, 2)  # [n, L, B, W]
        wide, length = accumulation(dtype), rows.shape[1]
        far, others = rows[self._far], self._others(self._replicas(self.rank))
        shares = [far[:, self._share(peer, length)].flatten(0, 1).to(dtype) for peer in others]
        sent, received = self._second_hop(length)
        arrived_rows = move(torch.cat([far[:0, 0].to(dtype), *shares]), received, sent)
        own = far[:, self._share(self.rank, length)].to(wide)
        own = own + arrived_rows.view(len(others), *own.shape).sum(0, dtype=wide)
        summed = iter(own)
        back = [rows[peer] if self._near(peer) else next(summed) for peer in self._all]
        sent, received = self._first_hop(length)
        arrived = move(torch.cat([x.to(dtype) for x in back]), received, sent).split(sent)
        out = rows.new_zeros((kv_heads, *rows.shape[1:]), dtype=wide)
        for peer, x in enumerate(arrived):
            out[peer // self.replicas][self._goes(peer, length)] += x
        return list(out.permute(2, 1, 0, 3).split([x.shape[-1] for x in parts], dim=-1))

    def moved(self, length: int, row: int) -> Moved:
        """What `to_sequence` moves, of so many local tokens and bytes of one head."""
        hops = zip(self._first_hop(length), self._second_hop(length), strict=True)
        sent, received = ([a + b for a, b in zip(*way, strict=True)] for way in hops)
        # All heads packed, what is sent and has come, and what all owners' come to, in its place.
        heads = self.num_ranks // self.replicas
        held = sum(sent) + sum(received) + (heads + 2 * self.num_ranks) * length
        return Moved.rows(sent, received, row, self.rank, workspace=held * row)

    @property
    def _all(self) -> range:
        return range(self.num_ranks)

    @property
    def _far(self) -> list[int]:
        """The ranks of other nodes."""
        return [peer for peer in self._all if not self._near(peer)]

    def _near(self, peer: int) -> bool:
        return peer // self.per_node == self.rank // self.per_node

    def _replicas(self, rank: int) -> tuple[int, ...]:
        return replica_ranks(rank, self.per_node, self.replicas)

    def _others(self, replicas: Sequence[int]) -> list[int]:
        return [peer for peer in replicas if peer != self.rank]

    def _share(self, rank: int, length: int) -> slice:
        """Which tokens of an owner on another node a rank takes in."""
        replicas = self._replicas(rank)
        return even_share(replicas.index(rank), len(replicas), length)

    def _goes(self, peer: int, length: int) -> slice:
        """Which of the local tokens go to a rank first."""
        return slice(0, length) if self._near(peer) else self._share(peer, length)

    def _first_hop(self, length: int) -> tuple[list[int], list[int]]:
        """Tokens to each rank and from each."""
        own = size_of(self._share(self.rank, length))
        sent = [size_of(self._goes(peer, length)) for peer in self._all]
        return sent, [length if self._near(peer) else own for peer in self._all]

    def _second_hop(self, length: int) -> tuple[list[int], list[int]]:
        """Tokens to each rank that shares the head in this node, and from each."""
        sent, received = [0] * self.num_ranks, [0] * self.num_ranks
        own, owners = size_of(self._share(self.rank, length)), len(self._far)
        for peer in self._others(self._replicas(self.rank)):
            sent[peer] = owners * own
            received[peer] = owners * size_of(self._share(peer, length))
        return sent, received
