"""Rows of equal work: the documents of several rows are dealt out among them anew.

Every rank of a step waits for the one whose rows take longest, and under a causal mask a row's
attention grows with the squares of its documents' lengths. Documents are dealt out longest first,
each to the row with the least work that has room for it, and documents that a row's end had cut are
joined again: no more documents are cut than by plain packing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from dtcp.pretrain.packing import Cursor, Row
from dtcp.pretrain.tokenizer import Ids


class DocumentPart(NamedTuple):
    """Tokens of one document that stand in one row."""

    tokens: Ids
    labels: Ids
    document: str

    def cut(self, length: int) -> tuple["DocumentPart", "DocumentPart"]:
        """The first `length` tokens, and the rest."""
        first, rest = slice(length), slice(length, None)
        return (
            DocumentPart(self.tokens[first], self.labels[first], self.document),
            DocumentPart(self.tokens[rest], self.labels[rest], self.document),
        )


def work_of(lengths: Sequence[int]) -> int:
    """Keys that the tokens of a row's documents see under a causal mask."""
    return sum(length * (length + 1) // 2 for length in lengths)


def balanced_in_windows(rows: Iterator[Row], start: Cursor, window: int) -> Iterator[Row]:
    """Rows from a cursor on, the documents of each `window` of them dealt out anew among these.

    Rows are the same on every mesh; those of a window come by falling work, so that neighbours
    have about as much of it.

    Args:
        rows: as documents follow each other, from where the cursor's window starts.
        start: `taken` rows of the first window are left out.
    """
    place, taken = replace(start, taken=0), start.taken
    while together := list(islice(rows, window)):
        following = together[-1].next
        for number, row in enumerate(balanced_rows(together), start=1):
            row.next = following if number == len(together) else replace(place, taken=number)
            if number > taken:
                yield row
        place, taken = following, 0


def balanced_rows(rows: Sequence[Row]) -> list[Row]:
    """Equally many rows of the same documents, each with about the same work, largest first."""
    seq_len = len(rows[0].tokens)
    pieces = [part for piece in _joined(rows) for part in _of_at_most(piece, seq_len)]
    held: list[list[DocumentPart]] = [[] for _ in rows]
    free, work = [seq_len] * len(rows), [0] * len(rows)

    def give(piece: DocumentPart, row: int) -> None:
        held[row].append(piece)
        free[row] -= len(piece.tokens)
        work[row] += work_of([len(piece.tokens)])

    # Longest first; of equal ones that which comes first, on every rank alike.
    left = [(-len(piece.tokens), number) for number, piece in enumerate(pieces)]
    heapify(left)
    while left:
        length, number = heappop(left)
        fits = [row for row in range(len(rows)) if free[row] >= -length]
        if fits:
            give(pieces[number], min(fits, key=lambda row: (work[row], row)))
            continue
        row = max(range(len(rows)), key=lambda row: (free[row], -row))
        first, pieces[number] = pieces[number].cut(free[row])
        give(first, row)
        heappush(left, (-len(pieces[number].tokens), number))
    order = sorted(range(len(rows)), key=lambda row: (-work[row], row))
    return [_row_of(held[row], seq_len) for row in order]


def share(rows: Sequence[Row], ranks: int) -> list[list[Row]]:
    """Deal rows out, equally many to each rank, with about the same work: largest first."""
    each, shares = len(rows) // ranks, [list[Row]() for _ in range(ranks)]
    work = [0] * ranks
    for row in sorted(rows, key=lambda row: -work_of(row.lengths)):
        rank = min((r for r in range(ranks) if len(shares[r]) < each), key=lambda r: work[r])
        shares[rank].append(row)
        work[rank] += work_of(row.lengths)
    return shares


def _joined(rows: Sequence[Row]) -> list[DocumentPart]:
    """The documents of rows that follow each other, each as one piece."""
    pieces: list[list[DocumentPart]] = []
    for number, row in enumerate(rows):
        bounds = [0, *np.cumsum(row.lengths).tolist()]
        for index, (start, stop) in enumerate(pairwise(bounds)):
            piece = DocumentPart(row.tokens[start:stop], row.labels[start:stop], row.names[index])
            goes_on = number > 0 and index == 0 and rows[number - 1].next.offset > 0
            if goes_on and pieces[-1][-1].document == piece.document:
                pieces[-1].append(piece)
            else:
                pieces.append([piece])
    return [_one(parts) for parts in pieces]


def _one(parts: Sequence[DocumentPart]) -> DocumentPart:
    if len(parts) == 1:
        return parts[0]
    tokens, labels = (np.concatenate(x) for x in list(zip(*parts, strict=True))[:2])
    return DocumentPart(tokens, labels, parts[0].document)


def _of_at_most(piece: DocumentPart, length: int) -> Iterator[DocumentPart]:
    while len(piece.tokens) > length:
        first, piece = piece.cut(length)
        yield first
    yield piece


def _row_of(pieces: Sequence[DocumentPart], seq_len: int) -> Row:
    row = Row.empty(seq_len)
    for piece in pieces:
        row.take(piece.tokens, piece.labels)
        row.end_document(len(piece.tokens), piece.document)
    return row
