"""State passing along the stretches of a document that ranks hold.

A summary goes straight to each rank that holds what follows in its document, once. Everything here
grows with documents and pieces, not with tokens.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.partition import Ints
from dtcp.sequence.stretches import Stretches, with_room


@dataclass(frozen=True, eq=False)
class StatePassing:
    """One rank's part in passing states along chains, in one direction."""

    send: Ints  # own stretches, by the rank they go to
    counts: Ints  # [2, n], sent and received
    steps: Ints  # [T, 3]: 1 to start anew; which summary to go through; whose state this is

    @classmethod
    def of(cls, stretches: Stretches, rank: int, *, reverse: bool) -> Self:
        """What this rank's stretches need, and what those of others need of them.

        Summaries are numbered: the rank's own, then those received, by rank and index.
        """
        n = stretches.num_shards
        sent: list[Ints] = []
        needed: list[Ints] = []
        for chain in stretches.chains:
            along = chain[::-1] if reverse else chain
            owner = stretches.rank[along]
            mine = np.flatnonzero(owner == rank)
            if not len(mine):
                continue
            needed.append(along[: mine[-1] + 1])
            ranks, back = np.unique(owner[::-1], return_index=True)
            last = len(owner) - 1 - back
            place, which = ((mine[:, None] < last) & (ranks != rank)).nonzero()
            sent.append(np.stack((ranks[which], stretches.index[along[mine[place]]])))
        # Each chain's last is the rank's own, which needs those before it.
        others = np.concatenate([np.zeros(0, dtype=np.int64), *(x[:-1] for x in needed)])
        others = np.sort(others[stretches.rank[others] != rank])
        to, index = np.concatenate([np.zeros((2, 0), dtype=np.int64), *sent], axis=1)
        by_peer = np.lexsort((index, to))
        counts = np.stack(
            (np.bincount(to, minlength=n), np.bincount(stretches.rank[others], minlength=n))
        )
        own = int((stretches.rank == rank).sum())
        steps = [_steps(stretches, along, others, own, rank) for along in needed]
        return cls(index[by_peer], counts, np.concatenate([np.zeros((0, 3), np.int64), *steps]))


def _steps(stretches: Stretches, along: Ints, others: Ints, own: int, rank: int) -> Ints:
    """The steps along a chain up to its last stretch of this rank."""
    mine = stretches.rank[along] == rank
    number = np.where(mine, stretches.index[along], own + np.searchsorted(others, along))
    anew, whose = np.zeros_like(along), np.where(mine, stretches.index[along], -1)
    anew[0], whose[0], number[-1] = 1, -1, -1
    return np.stack((anew, number, whose), axis=1)


def state_passing_tensors(stretches: Stretches, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """`StatePassing` to the right and to the left, of the same shapes on every rank.

    Returns:
        send [2, n * room], counts [2, 2, n], steps [2, (n + 1) * room, 3]; int64, -1 beyond.
    """
    both = [StatePassing.of(stretches, rank, reverse=reverse) for reverse in (False, True)]
    n, room = stretches.num_shards, stretches.room
    send = np.stack([with_room(x.send, n * room, -1) for x in both])
    steps = np.stack([with_room(x.steps, (n + 1) * room, -1) for x in both])
    counts = np.stack([x.counts for x in both])
    return torch.from_numpy(send), torch.from_numpy(counts), torch.from_numpy(steps)
