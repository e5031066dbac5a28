"""State passing along chains in two hops: a map crosses once to each node that reads it.

Of the ranks of a node that read a stretch's map one takes it in, each in turn, and hands it on
inside the node; what several ranks of a node read travels the network once.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.partition import Ints
from dtcp.sequence.stretches import Stretches, with_room


@dataclass(frozen=True, eq=False)
class NodeStatePassing:
    """One rank's part in passing states, in one direction.

    Summaries are numbered: the rank's own, then those that came in the first hop, by rank and
    index, then those of the second, by the rank that handed them on.
    """

    send: Ints  # own stretches, by the rank they go to
    counts: Ints  # [2, n], sent and received in the first hop
    steps: Ints  # [T, 3], as of StatePassing
    onward: Ints  # which of those that came in the first hop go on, by the rank they go to
    onward_counts: Ints  # [2, n], in the second hop

    @classmethod
    def of(
        cls, stretches: Stretches, rank: int, *, reverse: bool, ranks_per_node: int
    ) -> "NodeStatePassing":
        """What this rank's stretches need, and what it sends and hands on for others."""
        n, own = stretches.num_shards, int((stretches.rank == rank).sum())
        chains = [chain[::-1] if reverse else chain for chain in stretches.chains]
        none = np.zeros((0, 3), dtype=np.int64)
        hops = [_hops(stretches.rank[along], along, ranks_per_node) for along in chains]
        first, second = (np.concatenate(x) for x in zip((none, none), *hops, strict=True))
        # Columns: from, to, which stretch; of stretches, the order is that of ranks and indices.
        sent, received = first[first[:, 0] == rank], first[first[:, 1] == rank]
        on, arriving = second[second[:, 0] == rank], second[second[:, 1] == rank]
        sent, on = (x[np.lexsort((x[:, 2], x[:, 1]))] for x in (sent, on))
        received, arriving = (x[np.lexsort((x[:, 2], x[:, 0]))] for x in (received, arriving))
        number = np.full(len(stretches.rank), -1)
        number[stretches.rank == rank] = np.arange(own)
        number[received[:, 2]] = own + np.arange(len(received))
        number[arriving[:, 2]] = own + len(received) + np.arange(len(arriving))
        steps = [_steps(stretches, along, number, rank) for along in chains]
        return cls(
            stretches.index[sent[:, 2]],
            _counts(sent[:, 1], received[:, 0], n),
            np.concatenate([none, *steps]),
            number[on[:, 2]] - own,
            _counts(on[:, 1], arriving[:, 0], n),
        )

    @property
    def moved(self) -> Ints:
        """Sent to and received from each rank in both hops: [2, n]."""
        return self.counts + self.onward_counts


def _hops(owner: Ints, along: Ints, m: int) -> tuple[Ints, Ints]:
    """Who hands which stretch of a chain to whom, in the first hop and in the second: [R, 3] each.

    A rank reads all stretches before its last one, but its own.
    """
    ranks, back = np.unique(owner[::-1], return_index=True)
    last = len(owner) - 1 - back
    reads = (np.arange(len(owner))[:, None] < last) & (owner[:, None] != ranks)
    first, second = [], []
    for node in np.unique(ranks // m):
        members = ranks // m == node
        run, which = reads[:, members].nonzero()
        reader, here = ranks[members][which], owner[run] // m == node
        count = reads[:, members].sum(1)[run]
        turn = np.arange(len(run)) - np.searchsorted(run, run) == along[run] % np.maximum(count, 1)
        straight = here | turn
        first.append(np.stack((owner[run], reader, along[run]), axis=1)[straight])
        taker = np.zeros(len(owner), dtype=np.int64)
        taker[run[turn]] = reader[turn]
        second.append(np.stack((taker[run], reader, along[run]), axis=1)[~straight])
    return np.concatenate(first), np.concatenate(second)


def _counts(to: Ints, source: Ints, n: int) -> Ints:
    return np.stack((np.bincount(to, minlength=n), np.bincount(source, minlength=n)))


def _steps(stretches: Stretches, along: Ints, number: Ints, rank: int) -> Ints:
    """The steps along a chain up to its last stretch of this rank; none where it has none."""
    mine = np.flatnonzero(stretches.rank[along] == rank)
    along = along[: mine[-1] + 1] if len(mine) else along[:0]
    own = stretches.rank[along] == rank
    steps = np.stack((0 * along, number[along], np.where(own, stretches.index[along], -1)), axis=1)
    if len(steps):
        steps[0, 0], steps[0, 2], steps[-1, 1] = 1, -1, -1
    return steps


def node_state_passing_tensors(
    stretches: Stretches, rank: int, ranks_per_node: int
) -> tuple[Tensor, ...]:
    """`NodeStatePassing` to the right and to the left, of the same shapes on every rank.

    Returns:
        send [2, n * room], counts [2, 2, n], steps [2, (n + 1) * room, 3], onward
        [2, n * room * (ranks_per_node - 1)] and onward_counts [2, 2, n]; int64, -1 beyond.
    """
    both = [
        NodeStatePassing.of(stretches, rank, reverse=reverse, ranks_per_node=ranks_per_node)
        for reverse in (False, True)
    ]
    n, room = stretches.num_shards, stretches.room
    both_ways = (
        [with_room(x.send, n * room, -1) for x in both],
        [x.counts for x in both],
        [with_room(x.steps, (n + 1) * room, -1) for x in both],
        [with_room(x.onward, n * room * (ranks_per_node - 1), -1) for x in both],
        [x.onward_counts for x in both],
    )
    return tuple(torch.from_numpy(np.stack(pair)) for pair in both_ways)
