"""The runs of a layout, as arrays: what an exchange between ranks is worked out from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

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
    memo: dict[tuple[str, int], Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def ascending(cls, start: Ints, owner: Ints, seq_len: int) -> "Partition":
        """Of runs that each rank holds in ascending order."""
        stop = stops_of(start, seq_len)
        out = cls(start, stop, owner, np.empty_like(start))
        before = sums_before((stop - start)[out.by_owner])[:-1]
        # Of each run, the tokens of all ranks before its own.
        first = out.first_of_owner[:-1]
        first, count = first[some := out.first_of_owner[1:] > first], np.diff(out.first_of_owner)
        out.slot[out.by_owner] = before - before[first].repeat(count[some])
        return out

    @cached_property
    def by_owner(self) -> Ints:
        """Which runs each rank holds, rank 0's first, from left to right: [P]."""
        return order_of_small(self.owner)

    @cached_property
    def first_of_owner(self) -> Ints:
        """Where each rank's runs start in `by_owner`, and how many there are: [ranks + 1]."""
        return sums_before(np.bincount(self.owner))

    def of_owner(self, rank: int) -> Ints:
        """Which runs a rank holds, from left to right."""
        if rank + 1 >= len(self.first_of_owner):
            return self.by_owner[:0]
        return self.by_owner[self.first_of_owner[rank] : self.first_of_owner[rank + 1]]

    def pieces(self, rank: int) -> Ints:
        """Which runs a rank holds, in the order of its slots."""
        mine = self.of_owner(rank)
        return mine[self.slot[mine].argsort(kind="stable")]

    def runs(self, rank: int) -> list[Run]:
        """The rank's, in the order of its slots, neighbours joined; worked out once."""
        if ("runs", rank) not in self.memo:
            mine = self.pieces(rank)
            pairs = zip(self.start[mine].tolist(), self.stop[mine].tolist(), strict=True)
            self.memo["runs", rank] = joined_runs(list(pairs))
        return [*self.memo["runs", rank]]

    def tokens(self, rank: int) -> NDArray[np.int32]:
        """Token index of each of the rank's slots: [L]; worked out once, for all who read it."""
        if ("tokens", rank) not in self.memo:
            mine = self.pieces(rank)
            start = self.start[mine]
            self.memo["tokens", rank] = expand_tokens(start, self.stop[mine] - start)
        return self.memo["tokens", rank]


def joined_neighbours(start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """Runs from left to right with neighbours in one run."""
    new = np.ones(len(start), dtype=bool)
    np.not_equal(start[1:], stop[:-1], out=new[1:])
    first = new.nonzero()[0]
    return start[first], stop[stops_of(first, len(start)) - 1]


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
    return along_runs(start, 1, length, room=room)


def along_runs(
    first: Ints, step: Ints | int, length: Ints, *, room: int | None = None
) -> NDArray[np.int32]:
    """Numbers that change by the same from place to place of a run.

    Args:
        first, length: of each run, [R].
        step: likewise, or 1 for all.
        room: of the result, where it is more than the runs need: nobody reads the rest, and to
            fill it takes as long as all else.
    """
    before = sums_before(length)
    place = np.arange(before[-1], dtype=np.int32)
    # Counted on through all places: what a run has at its own, less what it has at the first one.
    offset = (first - step * before[:-1]).astype(np.int32).repeat(length)
    # Of torch, whose empty memory tests fill: what is read of it by mistake is no token.
    size = len(place) if room is None else room
    out = torch.empty(size, dtype=torch.int32, device="cpu").numpy()
    moved = place if isinstance(step, int) else place * step.astype(np.int32).repeat(length)
    np.add(offset, moved, out=out[: len(place)])
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


def differs(x: NDArray[Any]) -> NDArray[np.bool_]:
    """Which entries are not as the one before them, the first one among these: [N]."""
    new = np.empty(len(x), dtype=bool)
    new[:1] = True
    np.not_equal(x[1:], x[:-1], out=new[1:])
    return new


def unique_ascending(x: Ints) -> Ints:
    """The different numbers of x in ascending order; np.unique hashes them first."""
    # x is mostly a few ascending lists one after another, which a stable sort merges.
    x = np.sort(x, kind="stable")
    return x[differs(x)]


def order_of_small(x: Ints) -> Ints:
    """`x.argsort(kind="stable")` of numbers from 0 up; below 65536 they are not compared."""
    small = x.astype(np.uint16) if x.max(initial=0) < 1 << 16 else x
    return small.argsort(kind="stable")


def ascending_order(x: Ints) -> Ints | None:
    """`x.argsort(kind="stable")`, fast where x is ascending lists one after another.

    None where x ascends: there is nothing to move.
    """
    if not len(x) or bool((x[1:] >= x[:-1]).all()):
        return None
    return x.argsort(kind="stable")


def merged_cuts(one: Ints, other: Ints) -> tuple[Ints, Ints, Ints]:
    """Where either of two lists has a cut, and the stretch of each list that begins there.

    Both ascend from one place on. The second may be far shorter: only its own are searched for.

    Returns:
        places, and of each the last of `one` and the last of `other` up to it: three [C].
    """
    index = one.searchsorted(other)
    new = one.take(index, mode="clip") != other
    place = index + sums_before(new.astype(np.int64))[:-1]
    count, added = len(one) + int(np.count_nonzero(new)), place[new]
    of_other = np.arange(len(other)).repeat(stops_of(place, count) - place)
    kept = np.ones(count, dtype=bool)
    kept[added] = False
    cuts = np.empty(count, dtype=np.int64)
    cuts[kept], cuts[added] = one, other[new]
    return cuts, kept.cumsum() - 1, of_other


def overlaps(start: Ints, stop: Ints, piece_start: Ints, piece_stop: Ints) -> tuple[Ints, Ints]:
    """Pairs of a run and a piece that meet; pieces ascend and do not overlap each other."""
    low = piece_stop.searchsorted(start, side="right")
    high = piece_start.searchsorted(stop, side="left")
    count = np.maximum(high - low, 0)
    return np.arange(len(start)).repeat(count), expand(low, count)


def intersections(
    start: Ints, stop: Ints, piece_start: Ints, piece_stop: Ints
) -> tuple[Ints, Ints, Ints, Ints]:
    """`overlaps`, and where what a run and a piece share starts and stops."""
    run, piece = overlaps(start, stop, piece_start, piece_stop)
    shared_start, shared_stop = piece_start[piece], piece_stop[piece]
    # Of a run's pieces, the first one may start before it, and the last one stop behind it.
    new = differs(run)
    first = new.nonzero()[0]
    last = stops_of(first, len(run)) - 1
    run_of_first = run[first]
    shared_start[first] = np.maximum(shared_start[first], start[run_of_first])
    shared_stop[last] = np.minimum(shared_stop[last], stop[run_of_first])
    return run, piece, shared_start, shared_stop
