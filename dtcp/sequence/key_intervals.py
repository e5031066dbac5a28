"""The keys that the tokens of a batch see: intervals, held as runs of tokens, row by row."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.arguments import WHOLE_NUMBERS, check_tensor
from dtcp.sequence.coords import Coords
from dtcp.sequence.interval_runs import IntervalRuns, read_off_runs
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.mask_runs import interval_runs
from dtcp.sequence.masks import Mask, MemoryDocument
from dtcp.sequence.partition import Ints


@dataclass(frozen=True, eq=False)
class KeyIntervals:
    """The keys that the tokens of each row of a batch see.

    Args:
        runs: one for each row; of masks of several intervals, the first interval of all rows, then
            the second of all rows, and so on.
        keys: the layout of the sequence that has the keys, where that is another one.
        per_token: how many intervals a token has.
        memo: what is derived from them more than once, by what it is derived from.
    """

    runs: tuple[IntervalRuns, ...]
    keys: SequenceLayout | None = None
    per_token: int = 1
    memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, mask: Mask, coords: Coords) -> "KeyIntervals":
        keys = mask.memory(coords).layout if isinstance(mask, MemoryDocument) else None
        by_row = [interval_runs(mask, coords, row) for row in range(coords.rows)]
        return cls(tuple(chain.from_iterable(zip(*by_row, strict=True))), keys, len(by_row[0]))

    @property
    def rows(self) -> int:
        return len(self.runs) // self.per_token

    def layout_of_keys(self, layout: SequenceLayout) -> SequenceLayout:
        """How the keys of queries that lie in `layout` are sharded."""
        return layout if self.keys is None else self.keys

    @classmethod
    def read_off(cls, first_key: Tensor, last_key: Tensor) -> "KeyIntervals":
        """From the first and the last key of every token, [B, S] each."""
        check_intervals(first_key, last_key)
        if not first_key.shape[1]:
            raise ValueError(
                f"Intervals are of the tokens of whole rows, got first_key.shape="
                f"{tuple(first_key.shape)}: give [B, S]."
            )
        return cls(tuple(map(read_off_runs, first_key.numpy(), last_key.numpy())))

    def check_whole_rows(self, layout: SequenceLayout) -> None:
        """Refuse intervals that are not of the layout's rows."""
        lengths = {int(runs.stop[-1]) for runs in self.runs}
        num_keys = self.layout_of_keys(layout).seq_len
        inside = all(
            runs.first.min() >= 0
            and (runs.last + runs.last_step * (runs.stop - runs.start - 1)).max() < num_keys
            for runs in self.runs
        )
        if lengths != {layout.seq_len} or not inside:
            raise ValueError(
                f"The intervals of a mask are those of whole rows, got {self.rows} rows of "
                f"{sorted(lengths)} tokens with {layout}: take them from KeyIntervals.of(mask, "
                f"coords) of the batch's coords."
            )

    def at(self, tokens: Ints) -> tuple[Tensor, Tensor]:
        """The first and the last key of some tokens of each row: [L] to two [B, L], int32.

        [I, B, L] for masks of several intervals, as in `Mask.intervals`.
        """
        rows = [runs.at(tokens) for runs in self.runs]
        first, last = (np.stack(x).astype(np.int32) for x in zip(*rows, strict=True))
        return self.stacked(torch.from_numpy(first)), self.stacked(torch.from_numpy(last))

    def stacked(self, x: Tensor, *, dim: int = 0) -> Tensor:
        """Split what `runs` come to in `dim`: [I B, ...] to [I, B, ...], or as it is for I = 1."""
        return x if self.per_token == 1 else x.unflatten(dim, (self.per_token, self.rows))

    def in_line(self) -> "KeyIntervals":
        """The intervals on the line of all rows; `row_layouts.in_line` lays out its keys, too."""
        lines = [
            self._line(self.runs[start : start + self.rows])
            for start in range(0, len(self.runs), self.rows)
        ]
        return KeyIntervals(tuple(lines), per_token=self.per_token)

    def _line(self, rows: Sequence[IntervalRuns]) -> IntervalRuns:
        columns: list[list[Ints]] = [[], [], [], [], [], []]
        for row, runs in enumerate(rows):
            seq_len = int(runs.stop[-1])
            start, stop = (x + row * seq_len for x in (runs.start, runs.stop))
            num_keys = seq_len if self.keys is None else self.keys.seq_len
            first_key, last_key = (x + row * num_keys for x in (runs.first, runs.last))
            row_columns = (start, stop, first_key, runs.first_step, last_key, runs.last_step)
            for column, x in zip(columns, row_columns, strict=True):
                column.append(x)
        return IntervalRuns(*map(np.concatenate, columns))

    def whole(self) -> tuple[Tensor, Tensor]:
        """The first and the last key of every token: two [B, S] or [I, B, S], int32."""
        rows = [runs.whole() for runs in self.runs]
        first, last = (torch.from_numpy(np.stack(x)) for x in zip(*rows, strict=True))
        return self.stacked(first), self.stacked(last)

    def reach(self) -> tuple[int, int]:
        """How many tokens left and right of itself a token sees, at most."""
        left = right = 0
        for runs in self.runs:
            end = runs.stop - runs.start - 1
            for token, first, last in (
                (runs.start, runs.first, runs.last),
                (
                    runs.stop - 1,
                    runs.first + runs.first_step * end,
                    runs.last + runs.last_step * end,
                ),
            ):
                seen = last >= first
                left = max(left, int((token - first)[seen].max(initial=0)))
                right = max(right, int((last - token)[seen].max(initial=0)))
        return left, right


def check_intervals(first_key: Tensor, last_key: Tensor) -> None:
    """Refuse anything but an interval per query, [B, L] each."""
    named = {"first_key": first_key, "last_key": last_key}
    check_tensor("Attention", shape="[B, L]", ndim=2, dtypes=WHOLE_NUMBERS, **named)
    if first_key.shape != last_key.shape:
        raise ValueError(
            f"A query sees the keys from a first to a last one, got first_key.shape="
            f"{tuple(first_key.shape)}, last_key.shape={tuple(last_key.shape)}: take both from "
            f"Mask.intervals."
        )
