"""The runs of a layout, as arrays: what an exchange between ranks is worked out from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Run = tuple[int, int]
"""Token indices from start up to stop, without stop."""


@dataclass(frozen=True, eq=False)
class Partition:
    """All runs of a layout, from the left of the row to its right. Each field [P]."""

    start: Ints
    stop: Ints
    owner: Ints
    slot: Ints  # of the run's first token, in its owner's shard

    @classmethod
    def ascending(cls, start: Ints, owner: Ints, seq_len: int) -> "Partition":
        """Of runs that each rank holds in ascending order."""
        stop = np.append(start[1:], seq_len)
        order = owner.argsort(kind="stable")
        before = np.append(0, np.cumsum((stop - start)[order])[:-1])
        mine, first = np.unique(owner[order], return_index=True)
        slot = np.empty_like(start)
        slot[order] = before - before[first][np.searchsorted(mine, owner[order])]
        return cls(start, stop, owner, slot)

    def runs(self, rank: int) -> list[Run]:
        """The rank's, ascending, neighbours joined."""
        mine = self.owner == rank
        pairs = zip(self.start[mine].tolist(), self.stop[mine].tolist(), strict=True)
        return joined_runs(list(pairs))


def joined_runs(runs: Sequence[Run]) -> list[Run]:
    """The same tokens with neighbours in one run and empty runs left out."""
    joined: list[Run] = []
    for start, stop in runs:
        if joined and start == joined[-1][1]:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    return joined


def expand(start: Ints, length: Ints) -> Ints:
    """The numbers from each start on, so many: [R] and [R] to [sum of lengths]."""
    before = np.cumsum(length) - length
    return np.repeat(start - before, length) + np.arange(int(length.sum()))


def expand_tokens(start: Ints, length: Ints) -> NDArray[np.int32]:
    """`expand` to int32, for as many numbers as a rank has tokens: half the memory to write."""
    out = np.arange(int(length.sum()), dtype=np.int32)
    out += np.repeat((start - (np.cumsum(length) - length)).astype(np.int32), length)
    return out


def unique_ascending(x: Ints) -> Ints:
    """The different numbers of x in ascending order; np.unique hashes them first."""
    x = np.sort(x)
    return x[np.append(True, x[1:] != x[:-1])] if len(x) else x


def overlaps(start: Ints, stop: Ints, piece_start: Ints, piece_stop: Ints) -> tuple[Ints, Ints]:
    """Pairs of a run and a piece that meet; pieces ascend and do not overlap each other."""
    low = np.searchsorted(piece_stop, start, side="right")
    high = np.searchsorted(piece_start, stop, side="left")
    count = np.maximum(high - low, 0)
    return np.repeat(np.arange(len(start)), count), expand(low, count)
