"""The runs of a layout, as arrays: what an exchange between ranks is worked out from."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
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
    found: dict[int, NDArray[np.int32]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def ascending(cls, start: Ints, owner: Ints, seq_len: int) -> "Partition":
        """Of runs that each rank holds in ascending order."""
        stop = stops_of(start, seq_len)
        order = owner.argsort(kind="stable")
        ordered, before = owner[order], sums_before((stop - start)[order])[:-1]
        # Of each run, the tokens of all ranks before its own.
        first = starts_of_groups(ordered)
        slot = np.empty_like(start)
        slot[order] = before - before[first].repeat(np.diff(first, append=len(order)))
        return cls(start, stop, owner, slot)

    def runs(self, rank: int) -> list[Run]:
        """The rank's, ascending, neighbours joined."""
        mine = self.owner == rank
        pairs = zip(self.start[mine].tolist(), self.stop[mine].tolist(), strict=True)
        return joined_runs(list(pairs))

    def tokens(self, rank: int) -> NDArray[np.int32]:
        """Token index of each of the rank's slots: [L]; worked out once, for all who read it."""
        if rank not in self.found:
            mine = (self.owner == rank).nonzero()[0]
            mine = mine[self.slot[mine].argsort()]
            start = self.start[mine]
            self.found[rank] = expand_tokens(start, self.stop[mine] - start)
        return self.found[rank]


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
    before = length.cumsum() - length
    return (start - before).repeat(length) + np.arange(int(length.sum()))


def expand_tokens(start: Ints, length: Ints, *, room: int | None = None) -> NDArray[np.int32]:
    """`expand` to int32, for as many numbers as a rank has tokens; `room` as of `along_runs`."""
    some = length > 0
    return along_runs(start[some], 1, length[some], room=room)


def along_runs(
    first: Ints, step: Ints | int, length: Ints, *, room: int | None = None
) -> NDArray[np.int32]:
    """Numbers that change by the same from place to place of a run.

    Args:
        first: of each run of one place or more, [R].
        step, length: likewise.
        room: of the result, where it is more than the runs need: nobody reads the rest, and to
            fill it takes as long as all else.
    """
    before = sums_before(length)
    count = int(before[-1])
    # Of torch, whose empty memory tests fill: what is read of it by mistake is no token.
    out = torch.empty(count if room is None else room, dtype=torch.int32, device="cpu").numpy()
    steps = out[:count]
    steps[:] = step if isinstance(step, int) else step.astype(np.int32).repeat(length)
    last = first + step * (length - 1)
    jumps = first.copy()
    jumps[1:] -= last[:-1]
    steps[before[:-1]] = jumps
    np.add.accumulate(steps, out=steps)
    return out


def stops_of(start: Ints, end: int) -> Ints:
    """Where runs end that follow each other: [R], ascending starts and the end of the last."""
    stop = np.empty_like(start)
    stop[:-1], stop[-1:] = start[1:], end
    return stop


def sums_before(x: Ints) -> Ints:
    """The sum of what comes before each entry, and of all: [N] to [N + 1]."""
    sums = np.zeros(len(x) + 1, dtype=np.int64)
    x.cumsum(out=sums[1:])
    return sums


def differs(x: Ints) -> NDArray[np.bool_]:
    """Which entries are not as the one before them, the first one among these: [N]."""
    new = np.empty(len(x), dtype=bool)
    new[:1] = True
    np.not_equal(x[1:], x[:-1], out=new[1:])
    return new


def starts_of_groups(x: Ints) -> Ints:
    """Where another number begins: [groups]."""
    return differs(x).nonzero()[0]


def unique_ascending(x: Ints) -> Ints:
    """The different numbers of x in ascending order; np.unique hashes them first."""
    x = np.sort(x)
    return x[differs(x)]


def overlaps(start: Ints, stop: Ints, piece_start: Ints, piece_stop: Ints) -> tuple[Ints, Ints]:
    """Pairs of a run and a piece that meet; pieces ascend and do not overlap each other."""
    low = piece_stop.searchsorted(start, side="right")
    high = piece_start.searchsorted(stop, side="left")
    count = np.maximum(high - low, 0)
    return np.arange(len(start)).repeat(count), expand(low, count)
