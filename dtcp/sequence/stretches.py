"""What each rank computes in one go where pieces are of any lengths, and what lies left of it.

A rank's tokens, in the order of its slots, are cut wherever a document was cut: into stretches
that start or end inside a document, or not at all. Only at such a cut does a state, or the last
tokens, come from elsewhere; documents that are whole follow each other in one stretch.

    lengths=(3, 9), n=2      rank 0: 0 1 2 | 9 10 11       rank 1: 3 4 5 6 7 8
    stretches                0-3 | 9-12                    3-9
    handed on                3-9, of rank 1, to 9-12

The stretches of one document that hand something on to each other are its chain. The cost of all
this grows with documents and pieces, not with tokens.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.node_routes import LEAST_ROOM, NodeRoutes, Reads, node_routes, room_for
from dtcp.sequence.partition import Ints, Partition, differs
from dtcp.sequence.row_layouts import line_of


class LineOfDocuments(NamedTuple):
    """The documents of all rows, one row after another. Each field [D]."""

    start: Ints
    stop: Ints

    @classmethod
    def of(cls, documents: Documents) -> Self:
        lengths = [np.array(row, dtype=np.int64) for row in documents.lengths]
        rows = np.arange(len(lengths)) * documents.seq_len
        stop = np.concatenate([np.cumsum(x) + row for x, row in zip(lengths, rows, strict=True)])
        return cls(stop - np.concatenate(lengths), stop)

    def at(self, token: Ints) -> Ints:
        """The document of each token; -1 for padding."""
        document = np.searchsorted(self.start, token, side="right") - 1
        if not len(self.start):
            return document
        return np.where(token < self.stop[document], document, -1)

    def cut_at(self, token: Ints) -> Ints:
        """The document that a cut before a token goes through; -1 where it goes through none."""
        document = self.at(token)
        if not len(self.start):
            return document
        return np.where(token > self.start[document], document, -1)


@dataclass(frozen=True, eq=False)
class Stretches:
    """The stretches of all ranks, by rank and slot. Each field [R]."""

    num_shards: int
    rows: int
    line: Partition
    documents: LineOfDocuments
    rank: Ints
    index: Ints  # among the rank's own
    slot: Ints
    length: Ints
    first: Ints  # its first token, on the line of all rows
    enters: Ints  # the document that it starts inside of, or -1
    end: Ints  # the token after its last one
    leaves: Ints  # the document that it ends inside of, or -1

    @classmethod
    def of(cls, layout: SequenceLayout, documents: Documents) -> Self:
        line, of = line_of(layout, documents.batch).partition, LineOfDocuments.of(documents)
        order = np.lexsort((line.slot, line.owner))
        start, stop, owner, slot = (
            x[order] for x in (line.start, line.stop, line.owner, line.slot)
        )
        enters, leaves = of.cut_at(start), of.cut_at(stop)
        new = differs(owner)
        cut = (enters[1:] >= 0) | (leaves[:-1] >= 0)
        new[1:] |= cut & (start[1:] != stop[:-1])
        first = np.flatnonzero(new)
        last = np.append(first[1:], len(start)) - 1
        rank = owner[first]
        index = np.arange(len(first)) - np.searchsorted(rank, rank)
        length = slot[last] + stop[last] - start[last] - slot[first]
        parts = (
            rank,
            index,
            slot[first],
            length,
            start[first],
            enters[first],
            stop[last],
            leaves[last],
        )
        return cls(layout.num_shards, documents.batch, line, of, *parts)

    @property
    def least(self) -> int:
        """How many stretches tables have room for at least."""
        return LEAST_ROOM * self.rows

    @cached_property
    def room(self) -> int:
        """How many stretches tables have room for: one shape on all ranks, and for most batches."""
        return room_for(self.rank, self.least)

    def lengths(self, rank: int) -> Tensor:
        """Tokens of each stretch of the rank, then 0: [room] int64."""
        return torch.from_numpy(with_room(self.length[self.rank == rank], self.room, 0))

    @cached_property
    def chains(self) -> list[Ints]:
        """Which stretches hand on to each other, from left to right: a list for each document."""
        entering = np.flatnonzero(self.enters >= 0)
        entering = entering[self.first[entering].argsort()]
        document = self.enters[entering]
        ends = np.append(document[1:] != document[:-1], True)[: len(document)]
        each = np.split(entering, np.flatnonzero(ends)[:-1] + 1) if len(entering) else []
        by_end = self.end.argsort()
        before = by_end[np.searchsorted(self.end[by_end], [self.first[x[0]] for x in each])]
        return [np.append(source, x) for source, x in zip(before, each, strict=True)]


def left_routes(stretches: Stretches, reach: int, rank: int, ranks_per_node: int = 0) -> NodeRoutes:
    """Who sends which of the tokens left of stretches: as many as a reach, of the same document.

    The tokens left of a stretch end at place (index + 1) * reach among those that a rank brings.

    Args:
        ranks_per_node: neighbours that share a node; 0: one hop, straight from owner to reader.
    """
    entering = np.flatnonzero(stretches.enters >= 0)
    stop, index = stretches.first[entering], stretches.index[entering]
    start = stretches.documents.start[stretches.enters[entering]] if len(entering) else stop
    start = np.maximum(start, stop - reach)
    place = (index + 1) * reach - (stop - start)
    reads = Reads(stretches.rank[entering], start, stop, place)
    axis: dict[str, int] = {"num_ranks": stretches.num_shards, "ranks_per_node": ranks_per_node}
    return node_routes(reads, stretches.line, rank, **axis, least=stretches.least)


def with_room(x: Ints, length: int, value: int) -> Ints:
    """x and then a value, up to a length in dim 0."""
    out = np.full((length, *x.shape[1:]), value, dtype=np.int64)
    out[: len(x)] = x
    return out
