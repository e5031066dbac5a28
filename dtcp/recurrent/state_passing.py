"""State passing along the stretches of a document that ranks hold.

A summary goes straight to each rank that holds what follows in its document, once. Everything here
grows with documents and pieces, not with tokens.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.partition import Ints, differs
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
        n, chains = stretches.num_shards, stretches.chains
        none = np.zeros(0, dtype=np.int64)
        along = np.concatenate([none, *(x[::-1] if reverse else x for x in chains)])
        chain = np.arange(len(chains)).repeat([len(x) for x in chains])
        owner, place = stretches.rank[along], np.arange(len(along))
        # A rank reads all stretches of a chain before its last one there.
        last = np.full((len(chains), n), -1)
        last[chain, owner] = place
        mine = np.flatnonzero(owner == rank)
        reads = last[chain[mine]] > mine[:, None]
        reads[:, rank] = False
        sent, to = reads.nonzero()
        index = stretches.index[along[mine[sent]]]
        by_peer = np.lexsort((index, to))
        read = place <= last[chain, rank]
        along, chain, owner = along[read], chain[read], owner[read]
        others = np.sort(along[owner != rank])
        counts = (np.bincount(to, minlength=n), np.bincount(stretches.rank[others], minlength=n))
        own = int((stretches.rank == rank).sum())
        # Each chain's last is the rank's own, which needs those before it.
        anew, ends = differs(chain), np.append(differs(chain)[1:], True)[: len(chain)]
        whose = np.where(owner == rank, stretches.index[along], -1)
        number = np.where(owner == rank, whose, own + np.searchsorted(others, along))
        steps = (anew, np.where(ends, -1, number), np.where(anew, -1, whose))
        return cls(index[by_peer], np.stack(counts), np.stack(steps, axis=1).astype(np.int64))


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
