"""What a rank's own tokens see: the runs of a mask that lie in its pieces, by slot."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtcp.sequence.interval_runs import IntervalRuns
from dtcp.sequence.partition import Ints, Partition, along_runs, stops_of, unique_ascending

LEAST_CUTS = 8
"""Tiles beyond those of equal length that a table has room for, at least."""


class TileLimits(NamedTuple):
    """The ends of the intervals of the queries of each tile. Each field [tiles]."""

    low: Ints  # the least first key, of queries that see any; greater than all tokens for none
    high: Ints  # the greatest last key; -1 for none
    inner_low: Ints  # the greatest first key
    inner_high: Ints  # the least last key; -1 where a query sees none
    all_see: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class SlotRuns:
    """The keys that one rank's slots of a row see, from slot 0 on. Each field [R]."""

    slot: Ints
    length: Ints
    first: Ints  # the first key of the run's first slot
    first_step: Ints  # 0 or 1, from slot to slot
    last: Ints
    last_step: Ints

    @classmethod
    def of(cls, runs: IntervalRuns, partition: Partition, rank: int) -> "SlotRuns":
        """Cut a mask's runs along the rank's pieces."""
        mine = (partition.owner == rank).nonzero()[0]
        start, stop = partition.start[mine], partition.stop[mine]
        piece = start.searchsorted(runs.start, side="right") - 1
        inside = (piece >= 0) & (runs.start < stop[piece])
        token = unique_ascending(np.concatenate((start, runs.start[inside])))
        piece = start.searchsorted(token, side="right") - 1
        slot = partition.slot[mine][piece] + token - start[piece]
        token, slot = token[order := slot.argsort()], slot[order]
        run = runs.start.searchsorted(token, side="right") - 1
        after = token - runs.start[run]
        first_step, last_step = runs.first_step[run], runs.last_step[run]
        length = np.diff(slot, append=int((stop - start).sum()))
        first, last = runs.first[run] + first_step * after, runs.last[run] + last_step * after
        return cls(slot, length, first, first_step, last, last_step)

    @classmethod
    def whole(cls, runs: IntervalRuns) -> "SlotRuns":
        """Of one rank that holds the whole row."""
        length = runs.stop - runs.start
        return cls(runs.start, length, runs.first, runs.first_step, runs.last, runs.last_step)

    def by_slot(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The first and the last key of every slot: two [L]."""
        return (
            along_runs(self.first, self.first_step, self.length),
            along_runs(self.last, self.last_step, self.length),
        )

    def tile_bounds(self, tile: int) -> Ints:
        """Where tiles of at most so many neighbouring slots start, and the end of them all.

        A tile reads all keys that any of its queries sees. So where its queries are of two pieces
        or documents, it is cut between them if that spares more keys than a tile is worth: of the
        most expensive places as many as there is room for. Each entry [tiles + 1], of a number that
        the slots alone decide; those that are not needed are empty tiles at the end.
        """
        shard_len = int(self.length.sum())
        grid = np.arange(0, shard_len, tile)
        room = LEAST_CUTS + len(grid) // 16
        found = np.sort(np.append(grid, self._costly_borders(grid, tile)[:room]))
        bounds = np.full(len(grid) + room + 1, shard_len)
        bounds[: len(found)] = found
        return bounds

    def _costly_borders(self, grid: Ints, tile: int) -> Ints:
        """Slots inside of tiles where other keys are seen from there on, the worst first."""
        slot = unique_ascending(np.concatenate((self.slot, grid)))
        run = self.slot.searchsorted(slot, side="right") - 1
        begin, end = slot - self.slot[run], np.append(slot[1:], self.length.sum()) - self.slot[run]
        low = self.first[run] + self.first_step[run] * begin
        high = self.last[run] + self.last_step[run] * (end - 1) + 1
        # Keys that are seen before each stretch of slots, from its tile's start, and in the tile.
        seen = np.append(0, np.cumsum(np.maximum(high - low, 0)))
        of_tile = slot.searchsorted(grid)
        first = np.repeat(of_tile, np.diff(of_tile, append=len(slot)))
        last = np.repeat(np.append(of_tile[1:], len(slot)), np.diff(of_tile, append=len(slot)))
        before, after = seen[:-1] - seen[first], seen[last] - seen[:-1]
        passed = slot - slot[first]
        length = np.append(slot, self.length.sum())[last] - slot[first]
        spared = passed * after + (length - passed) * before
        apart = np.append(False, (low[1:] >= high[:-1]) | (high[1:] <= low[:-1]))
        worth = (apart & (passed > 0) & (spared > tile * tile)).nonzero()[0]
        borders: Ints = slot[worth[(-spared[worth]).argsort(kind="stable")]]
        return borders

    def tiles(self, bounds: Ints) -> TileLimits:
        """Of tiles of neighbouring slots that start and end there; empty ones at the end."""
        shard_len = int(self.length.sum())
        starts = bounds[: bounds.searchsorted(shard_len)]
        slot = unique_ascending(np.concatenate((self.slot, starts)))
        run = self.slot.searchsorted(slot, side="right") - 1
        begin = slot - self.slot[run]
        end = stops_of(slot, shard_len) - 1 - self.slot[run]
        first, last = self.first[run], self.last[run]
        first_step, last_step = self.first_step[run], self.last_step[run]
        sees, beyond = last >= first, np.iinfo(np.int64).max
        each = slot.searchsorted(starts)
        low = np.where(sees, first + first_step * begin, beyond)
        high = np.where(sees, last + last_step * end, -1)
        empty = len(bounds) - 1 - len(starts)
        limits = (
            (np.minimum.reduceat(low, each), beyond),
            (np.maximum.reduceat(high, each), -1),
            (np.maximum.reduceat(first + first_step * end, each), -1),
            (np.minimum.reduceat(last + last_step * begin, each), -1),
            (np.logical_and.reduceat(sees, each), False),
        )
        return TileLimits(*(np.append(x, np.full(empty, rest, x.dtype)) for x, rest in limits))
