"""What tokens cost under masks, as runs: what layouts balance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.arguments import WHOLE_NUMBERS, check_tensor
from dtcp.sequence.coords import Coords
from dtcp.sequence.mask_runs import interval_runs
from dtcp.sequence.masks import Mask
from dtcp.sequence.partition import Ints, stops_of, sums_before, unique_ascending


@dataclass(frozen=True)
class WorkRuns:
    """What the tokens of one row cost: on a run it grows by the same from token to token.

    Each field [R].
    """

    start: Ints
    stop: Ints
    work: Ints  # of the run's first token
    step: Ints

    @classmethod
    def of(cls, masks: Sequence[tuple[Mask, int]], coords: Coords, row: int = 0) -> "WorkRuns":
        """Keys that tokens see, summed over masks as often as each is applied."""
        parts = [
            (runs, times) for mask, times in masks for runs in interval_runs(mask, coords, row)
        ]
        seq_len = coords.seq_len
        start = unique_ascending(np.concatenate([runs.start for runs, _ in parts]))
        work, step = np.zeros_like(start), np.zeros_like(start)
        for runs, times in parts:
            run = runs.start.searchsorted(start, side="right") - 1
            first, last = runs.at(start)
            seen = last >= first
            work += times * np.where(seen, last - first + 1, 0)
            step += times * np.where(seen, runs.last_step[run] - runs.first_step[run], 0)
        return cls(start, stops_of(start, seq_len), work, step)

    @classmethod
    def of_tokens(cls, work: Tensor) -> "WorkRuns":
        """Read off the work of all tokens, [S].

        Raises:
            TypeError, ValueError: no tensor of whole numbers for the tokens of one row, or less
                than nothing.
        """
        check_tensor("Work to balance", shape="[S]", ndim=1, dtypes=WHOLE_NUMBERS, work=work)
        values = work.cpu().numpy().astype(np.int64)
        if values.min(initial=0) < 0:
            raise ValueError(
                f"Work to balance is 0 or more for each token, got work={values.min()} for token "
                f"{values.argmin()}: give how many keys it sees."
            )
        steps = np.diff(values)
        new = np.ones(len(values), dtype=bool)
        new[2:] = steps[1:] != steps[:-1]
        if len(values) > 1:
            new[1] = False
        start = np.flatnonzero(new)
        stop = stops_of(start, len(values))
        second = np.minimum(start + 1, stop - 1)
        return cls(start, stop, values[start], values[second] - values[start])

    @property
    def total(self) -> int:
        return int(self._of_runs().sum())

    def of_blocks(self, block: int) -> Ints:
        """The work of each of the equal blocks that the row is cut into: [S / block]."""
        bounds = np.arange(0, int(self.stop[-1]) + 1, block)
        run = self.start.searchsorted(bounds, side="right") - 1
        some = bounds - self.start[run]
        before = sums_before(self._of_runs())[run]
        return np.diff(before + self._of_first(some, run))

    def _of_runs(self) -> Ints:
        return self._of_first(self.stop - self.start, slice(None))

    def _of_first(self, count: Ints, run: Ints | slice) -> Ints:
        """The work of so many tokens of each of some runs."""
        return count * self.work[run] + self.step[run] * (count * (count - 1) // 2)


@dataclass(frozen=True)
class MaskWork:
    """The work of a batch under masks, each applied so many times; counted when it is asked for."""

    masks: tuple[tuple[Mask, int], ...]
    coords: Coords

    @classmethod
    def under(cls, masks: Mask | Mapping[Mask, int], coords: Coords) -> "MaskWork":
        """Of one mask, or of several with the number of times that each is applied.

        Raises:
            ValueError: no mask, or one that is applied less than once.
        """
        times = {masks: 1} if isinstance(masks, Mask) else masks
        if not times or min(times.values()) < 1:
            raise ValueError(
                f"Work is balanced for masks that are applied once or more, got {dict(times)}: "
                f"give each mask of the model the number of its layers."
            )
        return cls(tuple(times.items()), coords)

    def __call__(self) -> Tensor:
        """Of all tokens, summed over rows: [S]."""
        return torch.stack([times * mask.work(self.coords) for mask, times in self.masks]).sum(0)

    @property
    def in_runs(self) -> bool:
        """Whether `runs` tell all: not of masks that count the work of tokens otherwise."""
        return all(type(mask).work is Mask.work for mask, _ in self.masks)

    def of_blocks(self, block: int) -> list[int]:
        """Of equal blocks of tokens, summed over rows; from runs."""
        rows = range(self.coords.rows)
        return np.sum([self.runs(row).of_blocks(block) for row in rows], 0).tolist()

    def of_row(self, row: int) -> "MaskWork":
        """That of a row by itself."""
        return MaskWork(self.masks, self.coords.of_row(row))

    def runs(self, row: int) -> WorkRuns:
        """Of one row."""
        return WorkRuns.of(self.masks, self.coords, row)
