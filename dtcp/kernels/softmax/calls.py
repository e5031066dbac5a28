"""Which calls of a plain kernel the pieces of a mask come to: one for many documents, few in all.

Pieces whose queries and keys follow each other, and that one window fits, are the sequences of one
packed call; a piece alone is a call on slices. Head-tail over one document is two calls in the
first step of a ring and one in every other; packed documents on a contiguous shard are one call.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.softmax.pieces import EVERY_ROW, UNLIMITED, Piece, read_pieces
from dtcp.sequence.host import on_device

MOST_CALLS = 8
"""Where more are needed each is small, and a kernel that takes any interval does them in one."""


class CallKind(Enum):
    """What a kernel must be able to do."""

    RECTANGLE = "rectangle"  # every query sees every key
    CAUSAL = "causal"  # up to the diagonal in the bottom right corner
    WINDOW = "window"  # so many keys left and right of that diagonal
    INTERVAL = "interval"  # whatever first and last key say


class Span(NamedTuple):
    """Queries and keys of one sequence."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int


class Lengths(NamedTuple):
    """Where the sequences of a packed call start: what kernels call cu_seqlens."""

    q: Tensor  # [sequences + 1] int32
    k: Tensor  # [sequences + 1] int32
    longest_q: int
    longest_k: int


@dataclass(frozen=True)
class Call:
    """One call of a plain kernel: one sequence, or several packed one after another.

    What it says of all spans is worked out once, for the layers that read the same table.

    Args:
        spans: ascending and apart.
        left, right: keys that a query sees beside its diagonal; None for all.
        every_row: whether the one span is of every row. Otherwise the rows are laid end to end,
            and spans count over all of them.
    """

    spans: tuple[Span, ...]
    left: int | None
    right: int | None
    every_row: bool = False

    @property
    def kind(self) -> CallKind:
        if self.left is None and self.right in (None, 0):
            return CallKind.RECTANGLE if self.right is None else CallKind.CAUSAL
        return CallKind.WINDOW

    @property
    def packed(self) -> bool:
        return len(self.spans) > 1

    @cached_property
    def skewed(self) -> bool:
        """Whether there are other numbers of queries than of keys under a diagonal."""
        unequal = any(s.q_stop - s.q_start != s.k_stop - s.k_start for s in self.spans)
        return unequal and self.kind is not CallKind.RECTANGLE

    @property
    def queries(self) -> slice:
        return slice(self.spans[0].q_start, self.spans[-1].q_stop)

    @property
    def keys(self) -> slice:
        return slice(self.spans[0].k_start, self.spans[-1].k_stop)

    def lengths(self, device: torch.device) -> Lengths:
        """Boundaries of the sequences, counted from the first query and the first key."""
        # Copied by each call: a copy that was kept could be read on another stream, too early.
        own = self._lengths
        return own._replace(q=on_device(own.q, device), k=on_device(own.k, device))

    @cached_property
    def _lengths(self) -> Lengths:
        """The same on the host.

        Queries between two spans see nothing here, and keys are seen by none: they are sequences
        without keys, and without queries.
        """
        at_q, at_k = self.spans[0].q_start, self.spans[0].k_start
        q, k = [0], [0]
        for span in self.spans:
            if span.q_start > at_q:
                q.append(q[-1] + span.q_start - at_q)
                k.append(k[-1])
            if span.k_start > at_k:
                q.append(q[-1])
                k.append(k[-1] + span.k_start - at_k)
            q.append(q[-1] + span.q_stop - span.q_start)
            k.append(k[-1] + span.k_stop - span.k_start)
            at_q, at_k = span.q_stop, span.k_stop
        longest_q, longest_k = (max(b - a for a, b in pairwise(x)) for x in (q, k))
        of_q, of_k = (torch.tensor(x, dtype=torch.int32, device="cpu") for x in (q, k))
        return Lengths(of_q, of_k, longest_q, longest_k)


def calls_of(table: Tensor, *, batch: int, length: int, num_keys: int) -> tuple[Call, ...] | None:
    """The calls that a table of pieces comes to; None where the mask is not a plain one.

    Args:
        table: of `find_pieces`.
        batch, length: rows, and queries in each.
        num_keys: keys in each row, empty slots behind them included.
    """
    pieces = read_pieces(table)
    if pieces is None:
        return None
    if all(piece.row == EVERY_ROW for piece in pieces):
        # Rows that are alike stay rows, unless documents are packed in them.
        groups = _grouped(pieces)
        if groups is None:
            return None
        if all(len(each.spans) == 1 for each in groups):
            return tuple(each.call(every_row=True) for each in groups)
    flat = (
        _laid_end_to_end(piece, row, length, num_keys)
        for row in range(batch)
        for piece in pieces
        if piece.row in (row, EVERY_ROW)
    )
    groups = _grouped(flat)
    return None if groups is None else tuple(each.call() for each in groups)


@dataclass
class _Group:
    """Spans of one call, and the windows that fit all of them."""

    spans: list[Span] = field(default_factory=list)
    left: tuple[int, int] = (0, UNLIMITED)
    right: tuple[int, int] = (0, UNLIMITED)

    def add(self, piece: Piece) -> bool:
        """Add a piece, if it lies behind the others and a window of theirs fits it."""
        left = _common(self.left, (piece.least_left, piece.most_left))
        right = _common(self.right, (piece.least_right, piece.most_right))
        behind = not self.spans or (
            self.spans[-1].q_stop <= piece.q_start and self.spans[-1].k_stop <= piece.k_start
        )
        if left is None or right is None or not behind:
            return False
        self.left, self.right = left, right
        self.spans.append(Span(*piece[1:5]))
        return True

    def call(self, *, every_row: bool = False) -> Call:
        left = None if self.left[1] == UNLIMITED else self.left[0]
        right = None if self.right[1] == UNLIMITED else self.right[0]
        return Call(tuple(self.spans), left, right, every_row)


def _grouped(pieces: Iterable[Piece]) -> list[_Group] | None:
    groups: list[_Group] = []
    for piece in pieces:
        if not any(group.add(piece) for group in groups):
            groups.append(_Group())
            groups[-1].add(piece)
        if len(groups) > MOST_CALLS:
            return None
    return groups


def _common(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int] | None:
    low, high = max(a[0], b[0]), min(a[1], b[1])
    return (low, high) if low <= high else None


def _laid_end_to_end(piece: Piece, row: int, length: int, num_keys: int) -> Piece:
    queries, keys = row * length, row * num_keys
    return piece._replace(
        row=row,
        q_start=piece.q_start + queries,
        q_stop=piece.q_stop + queries,
        k_start=piece.k_start + keys,
        k_stop=piece.k_stop + keys,
    )
