"""Rows of different documents in one batch: each is laid out by itself.

Rows never see each other, so a batch is one line of all its rows, on which every rank has its
tokens of the first row, then those of the second, and so on. What an exchange between ranks reads
of a layout, it reads of the line: how a batch is packed changes numbers, never a graph.

    rows of 6 tokens, n=2      rank 0: 0 1 5 | 1 2 3     rank 1: 2 3 4 | 0 4 5
    their line of 12           rank 0: 0 1 5 7 8 9       rank 1: 2 3 4 6 10 11
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.documents import Documents
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.mask_work import MaskWork
from dtcp.sequence.partition import Partition, Run


@dataclass(frozen=True)
class RowLayouts(SequenceLayout):
    """A layout for each row of a batch, all of one kind.

    `shard` and `restore` take tensors whose first dim is the batch's.
    """

    rows: tuple[SequenceLayout, ...]

    @property
    def kind(self) -> type[SequenceLayout]:
        return type(self.rows[0])

    @property
    def alike(self) -> bool:
        """Whether one layout serves all rows, after all. Not cached: dynamo traces this."""
        return all(row == self.rows[0] for row in self.rows[1:])

    def runs(self, rank: int) -> list[Run]:
        if self.alike:
            return self.rows[0].runs(rank)
        raise ValueError(
            f"The rows of a batch are laid out each by itself, got {len(self.rows)} of "
            f"{self.kind.__name__} where one layout is read for all: use HeadTail or Contiguous, "
            f"or one row per batch."
        )

    @cached_property
    def in_line(self) -> SequenceLayout:
        """The layout of the line of all rows."""
        return _Line(len(self.rows) * self.seq_len, self.num_shards, self.rows)

    def shard(self, x: Tensor, rank: int, *, dim: int = 1) -> Tensor:
        """Pick the rank's tokens of each row: S in dim becomes L. No communication."""
        self._check_len(x, dim)
        return self.of_each_row(x, lambda layout, row: layout.shard(row, rank, dim=dim))

    def restore(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """Put all shards, concatenated along dim, back into the order of the rows: S to S."""
        self._check_len(x, dim)
        return self.of_each_row(x, lambda layout, row: layout.restore(row, dim=dim))

    def of_each_row(
        self, x: Tensor, do: Callable[[SequenceLayout, Tensor], Tensor], *, rows_dim: int = 0
    ) -> Tensor:
        """Do something to each row by itself; one row stands for all."""
        count = len(self.rows)
        has_rows = -x.ndim <= rows_dim < x.ndim and x.shape[rows_dim] in (1, count)
        if self.alike and not (has_rows and x.shape[rows_dim] == 1):
            return do(self.rows[0], x)
        if not has_rows:
            raise ValueError(
                f"A batch of {count} rows, each laid out by itself, is cut row by row, got "
                f"x.shape={tuple(x.shape)}: give its rows in dim {rows_dim}."
            )
        each = x.split(1, dim=rows_dim) * (count // x.shape[rows_dim])
        pairs = zip(self.rows, each, strict=True)
        return torch.cat([do(layout, row) for layout, row in pairs], dim=rows_dim)


def in_line(layout: SequenceLayout, intervals: KeyIntervals) -> tuple[SequenceLayout, KeyIntervals]:
    """The layout of the line of all rows, and what the tokens on it see."""
    rows = intervals.rows
    keys = None if intervals.keys is None else line_of(intervals.keys, rows)
    return line_of(layout, rows), replace(intervals.in_line(), keys=keys)


def on_line(x: Tensor) -> Tensor:
    """The rows one after another: [B, L, ...] -> [1, B * L, ...]."""
    return x.flatten(0, 1)[None]


def rows_on(layout: SequenceLayout) -> int:
    """How many rows a layout lines up: one, unless `in_line` made it."""
    return len(layout.rows) if isinstance(layout, _Line) else 1


def line_of(layout: SequenceLayout, rows: int) -> SequenceLayout:
    """The layout of the line of so many rows."""
    if not isinstance(layout, RowLayouts):
        layout = RowLayouts(layout.seq_len, layout.num_shards, (layout,) * rows)
    return layout.in_line


def pieces_digest(layout: SequenceLayout) -> int:
    """A number that changes with which rank holds which tokens of which row."""
    partition = (layout.in_line if isinstance(layout, RowLayouts) else layout).partition
    return crc32(partition.owner.tobytes(), crc32(partition.start.tobytes()))


@dataclass(frozen=True)
class _Line(SequenceLayout):
    """What the layouts of rows come to, one row after another."""

    rows: tuple[SequenceLayout, ...]

    def runs(self, rank: int) -> list[Run]:
        self._check_rank(rank)
        return self.partition.runs(rank)

    @cached_property
    def partition(self) -> Partition:
        parts = [layout.partition for layout in self.rows]
        tokens = [index * layout.seq_len for index, layout in enumerate(self.rows)]
        slots = [index * layout.shard_len for index, layout in enumerate(self.rows)]
        return Partition(
            np.concatenate([x.start + first for x, first in zip(parts, tokens, strict=True)]),
            np.concatenate([x.stop + first for x, first in zip(parts, tokens, strict=True)]),
            np.concatenate([x.owner for x in parts]),
            np.concatenate([x.slot + first for x, first in zip(parts, slots, strict=True)]),
        )


def layout_of_batch(
    kind: type[SequenceLayout], documents: Documents, num_shards: int, work: MaskWork
) -> SequenceLayout:
    """The layout of this kind that suits the batch; of a kind that reads documents, one per row.

    A batch of several rows has one per row even where these are alike, so that all share a graph.
    """
    if documents.batch == 1 or not kind.reads_documents:
        return kind.for_batch(documents, num_shards, work=work)
    seq_len = documents.seq_len
    rows = [
        kind.for_batch(Documents((lengths,), seq_len), num_shards, work=work.of_row(row))
        for row, lengths in enumerate(documents.lengths)
    ]
    return RowLayouts(seq_len, num_shards, tuple(rows))
