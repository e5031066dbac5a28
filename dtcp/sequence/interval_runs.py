"""The keys that the tokens of a row see, as runs: a few numbers, nothing as long as the row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dtcp.sequence.interval_sets import Interval
from dtcp.sequence.partition import Ints, along_runs, differs, stops_of, unique_ascending


@dataclass(frozen=True)
class IntervalRuns:
    """The keys that the tokens of one row see: on a run both ends stand still or move by a token.

    Each field [R], of the runs from left to right; last < first where tokens see no key.
    """

    start: Ints
    stop: Ints
    first: Ints  # the first key of the run's first token
    first_step: Ints  # 0 or 1, from token to token
    last: Ints
    last_step: Ints

    def at(self, tokens: Ints) -> tuple[Ints, Ints]:
        """The first and the last key of each of these tokens."""
        run = self.start.searchsorted(tokens, side="right") - 1
        after = tokens - self.start[run]
        first = self.first[run] + self.first_step[run] * after
        return first, self.last[run] + self.last_step[run] * after

    def whole(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The same of each token of the row, without looking for its run."""
        length = self.stop - self.start
        first, last = (self.first, self.first_step), (self.last, self.last_step)
        return along_runs(*first, length), along_runs(*last, length)


def combined_runs(
    left: Sequence[IntervalRuns],
    right: Sequence[IntervalRuns],
    combine: Callable[[list[Interval], list[Interval]], list[Interval]],
) -> list[IntervalRuns]:
    """Apply `intersection` or `union` to runs instead of to all tokens of a row.

    Between two places where ends cross, either chooses the same ends for every token, and those
    stand still or move on as they did.
    """
    every = [*left, *right]
    start = _crossings(every)
    stop = stops_of(start, int(every[0].stop[-1]))
    tokens = np.concatenate((start, np.minimum(start + 1, stop - 1)))
    combined = combine(_at(left, tokens), _at(right, tokens))
    return [runs_of_ends(start, stop, first.numpy(), last.numpy()) for first, last in combined]


def _at(intervals: Sequence[IntervalRuns], tokens: Ints) -> list[Interval]:
    ends = (runs.at(tokens) for runs in intervals)
    return [(torch.from_numpy(first), torch.from_numpy(last)) for first, last in ends]


def _crossings(every: Sequence[IntervalRuns]) -> Ints:
    """Where runs start, and where one end of an interval meets another or leaves it."""
    start = unique_ascending(np.concatenate([runs.start for runs in every]))
    stop = stops_of(start, int(every[0].stop[-1]))
    places = [start]
    ends, steps = [], []
    for runs in every:
        run = runs.start.searchsorted(start, side="right") - 1
        first, last = runs.at(start)
        ends += [first, last + 1]
        steps += [runs.first_step[run], runs.last_step[run]]
    for index in range(len(ends)):
        for other in range(index):
            ahead, closer = ends[index] - ends[other], steps[other] - steps[index]
            # If only one of them moves, their distance changes by one with each token.
            meet = start + ahead * closer
            places += [
                place[(closer != 0) & (place > start) & (place < stop)]
                for place in (meet, meet + 1)
            ]
    return unique_ascending(np.concatenate(places))


def runs_of_ends(start: Ints, stop: Ints, first: Ints, last: Ints) -> IntervalRuns:
    """As few runs as possible, from the keys of each first token, then of each second one."""
    length = stop - start
    new = differs(last[: len(start)] >= first[: len(start)])
    columns = []
    for value, second in (x.reshape(2, -1) for x in (first, last)):
        step = second - value
        before, single = length[:-1], length[1:] == 1
        # A run of one token has no step of its own: it may continue the one before it.
        step[1:] = np.where(single, value[1:] - value[:-1] - step[:-1] * (before - 1), step[1:])
        new[1:] |= (step[1:] != step[:-1]) | (value[:-1] + step[:-1] * before != value[1:])
        new[1:] |= (step[1:] < 0) | (step[1:] > 1)
        columns += [value, step]
    kept = new.nonzero()[0]
    start, stop = start[kept], stops_of(start[kept], int(stop[-1]))
    alone = stop - start == 1
    first, first_step, last, last_step = (x[kept] for x in columns)
    first_step, last_step = (np.where(alone, 0, step) for step in (first_step, last_step))
    return IntervalRuns(start, stop, first, first_step, last, last_step)


def read_off_runs(first: NDArray[np.int32], last: NDArray[np.int32]) -> IntervalRuns:
    """Runs of the intervals of all tokens of a row, [S] each."""
    steps = np.stack((np.diff(first), np.diff(last)))
    new = differs(last >= first)
    new[1:] |= ((steps < 0) | (steps > 1)).any(0)
    new[2:] |= (steps[:, 1:] != steps[:, :-1]).any(0)
    start = new.nonzero()[0]
    stop = stops_of(start, len(first))
    second = np.minimum(start + 1, stop - 1)
    tokens = np.concatenate((start, second))
    return runs_of_ends(start, stop, first[tokens].astype(np.int64), last[tokens].astype(np.int64))
