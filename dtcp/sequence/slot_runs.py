"""What a rank's own tokens see: the runs of a mask that lie in its pieces, by slot."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtcp.sequence.interval_runs import IntervalRuns
from dtcp.sequence.neighbours import starts_of_equal
from dtcp.sequence.partition import (
    Ints,
    Partition,
    along_runs,
    stops_of,
    sums_before,
    unique_ascending,
)


class Tiles(NamedTuple):
    """Neighbouring queries that kernels take together, and the ends of their intervals."""

    bounds: Ints  # [tiles + 1], where they start and end; empty ones are at the end
    # [4, tiles]: the least first key of queries that see any, greater than all tokens for none;
    # behind the greatest last key, 0 for none; the greatest first key; behind the least last key.
    ends: Ints
    all_see: NDArray[np.bool_]  # [tiles]


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
        mine = partition.of_owner(rank)
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
        length = stops_of(slot, int((stop - start).sum())) - slot
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

    def tiles(self, tile: int) -> Tiles:
        """Tiles of at most so many neighbouring slots.

        A tile reads all keys that any of its queries sees. So where its queries are of two pieces
        or documents, it is cut between them, once, if that spares more keys than a tile is worth.
        Nothing outside of a tile decides that: a rank cuts the tiles of its chunks as one device
        does. How many tiles there are the slots alone decide; those that are not needed are empty
        ones at the end.
        """
        shard_len = int(self.slot[-1] + self.length[-1])
        grid = np.arange(0, shard_len, tile)
        parts = _Parts.of(self, grid, shard_len)
        start = np.sort(np.concatenate((grid, parts.costly_borders(grid, tile))))
        bounds = np.full(2 * len(grid) + 1, shard_len)
        bounds[: len(start)] = start
        return parts.tiles(start, bounds)


class _Parts(NamedTuple):
    """Slots that lie in one run and in one tile of equal length. Each field [K]."""

    slot: Ints
    stop: Ints
    first: Ints  # the first key of the first slot, and of the last one
    end_first: Ints
    last: Ints
    end_last: Ints
    sees: NDArray[np.bool_]

    @classmethod
    def of(cls, runs: SlotRuns, grid: Ints, shard_len: int) -> "_Parts":
        slot = unique_ascending(np.concatenate((runs.slot, grid)))
        stop = stops_of(slot, shard_len)
        run = runs.slot.searchsorted(slot, side="right") - 1
        after, more = slot - runs.slot[run], stop - slot - 1
        first_step, last_step = runs.first_step[run], runs.last_step[run]
        first, last = runs.first[run], runs.last[run]
        sees = last >= first
        first, last = first + first_step * after, last + last_step * after
        return cls(
            slot, stop, first, first + first_step * more, last, last + last_step * more, sees
        )

    def costly_borders(self, grid: Ints, tile: int) -> Ints:
        """Slots inside of tiles where other keys are seen from there on: the worst of each."""
        low, high = self.first, self.end_last + 1
        inner = (self.slot % tile > 0).nonzero()[0]
        apart = (low[inner] >= high[inner - 1]) | (high[inner] <= low[inner - 1])
        inner = inner[apart]
        slot, of_tile = self.slot[inner], self.slot[inner] // tile
        # Keys that are seen in the tile before each of the slots, and from there on.
        seen = sums_before(np.maximum(high - low, 0))
        run = np.concatenate((self.slot.searchsorted(grid), [len(self.slot)]))
        before, after = seen[inner] - seen[run[of_tile]], seen[run[of_tile + 1]] - seen[inner]
        passed = slot - grid[of_tile]
        left = np.minimum(tile, self.stop[-1] - grid[of_tile]) - passed
        spared = passed * after + left * before
        worst = np.lexsort((-spared, of_tile))
        worst = worst[starts_of_equal(of_tile[worst])]
        return slot[worst[spared[worst] > tile * tile]]

    def tiles(self, start: Ints, bounds: Ints) -> Tiles:
        """Of tiles that start there, and of empty ones up to the last of the bounds."""
        each, count = self.slot.searchsorted(start), len(start)
        beyond = np.iinfo(np.int64).max
        ends = np.zeros((4, len(bounds) - 1), dtype=np.int64)
        ends[0, count:] = beyond
        np.minimum.reduceat(np.where(self.sees, self.first, beyond), each, out=ends[0, :count])
        high = np.where(self.sees, self.end_last + 1, 0)
        np.maximum.reduceat(high, each, out=ends[1, :count])
        np.maximum.reduceat(self.end_first, each, out=ends[2, :count])
        np.minimum.reduceat(self.last + 1, each, out=ends[3, :count])
        all_see = np.zeros(len(bounds) - 1, dtype=bool)
        np.logical_and.reduceat(self.sees, each, out=all_see[:count])
        return Tiles(bounds, ends, all_see)
