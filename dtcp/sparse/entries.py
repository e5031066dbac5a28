"""Which finished entries go to which rank where pieces are of any lengths.

An entry lies with the last token of its window. A rank that holds tokens of a document needs the
document's entries up to the last of these, and no others; a document that one rank holds whole
sends none. Everything here grows with documents, pieces and the entries of one rank.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from dtcp.sequence.node_routes import LEAST_ROOM, NodeRoutes, Reads, node_routes
from dtcp.sequence.partition import Ints, Partition, expand, overlaps
from dtcp.sequence.stretches import Stretches


@dataclass(frozen=True, eq=False)
class EntryRuns:
    """The entries of all ranks in the pieces that documents were cut into. Each field [F].

    Pieces stand from the left of the line of all rows to its right.
    """

    ratio: int
    rows: int
    document: Ints
    document_start: Ints
    start: Ints  # token index on the line
    owner: Ints
    count: Ints  # entries whose last tokens lie in the piece
    place: Ints  # of the first, among the owner's entries

    @classmethod
    def of(cls, stretches: Stretches, ratio: int) -> Self:
        line, documents = stretches.line, stretches.documents
        document, piece = overlaps(documents.start, documents.stop, line.start, line.stop)
        first = documents.start[document]
        start = np.maximum(first, line.start[piece])
        stop = np.minimum(documents.stop[document], line.stop[piece])
        count = (stop - first) // ratio - (start - first) // ratio
        owner = line.owner[piece]
        order = np.argsort(owner, kind="stable")
        before = np.cumsum(count[order]) - count[order]
        at = np.searchsorted(owner[order], owner[order])
        place = np.empty_like(count)
        place[order] = before - before[at]
        return cls(ratio, stretches.rows, document, first, start, owner, count, place)

    def reads(self) -> Reads:
        """Of each rank and document that it holds some of, the entries up to its last token.

        Entries are numbered along the line; a rank's own are among those that it reads.
        """
        count = len(self.owner)
        # A rank's last piece of each document, and all pieces of the document up to that.
        order = np.lexsort((np.arange(count), self.document, self.owner))
        owner, document = self.owner[order], self.document[order]
        ends = (owner[1:] != owner[:-1]) | (document[1:] != document[:-1])
        last = order[np.append(ends, True)[:count]]
        first = np.searchsorted(self.document, self.document[last])
        start, stop = self.number[first], self.number[last] + self.count[last]
        rank, length = self.owner[last], stop - start
        before = np.cumsum(length) - length
        return Reads(rank, start, stop, before - before[np.searchsorted(rank, rank)])

    @property
    def number(self) -> Ints:
        """Of the first entry of each piece, along the line."""
        return np.cumsum(self.count) - self.count

    @property
    def held(self) -> Partition:
        """Who holds which entries, where among its own."""
        some, number = self.count > 0, self.number
        stop = number + self.count
        return Partition(number[some], stop[some], self.owner[some], self.place[some])

    def closing(self, reads: Reads, rank: int) -> Ints:
        """The last token of each entry that a rank reads, in their order."""
        of_rank = reads.rank == rank
        numbers = expand(reads.start[of_rank], (reads.stop - reads.start)[of_rank])
        piece = np.searchsorted(self.number + self.count, numbers, side="right")
        first = self.document_start[piece]
        before = (self.start[piece] - first) // self.ratio + numbers - self.number[piece]
        return first + self.ratio * (before + 1) - 1


def entry_routes(
    runs: EntryRuns, rank: int, *, num_ranks: int, ranks_per_node: int = 0
) -> tuple[NodeRoutes, Ints]:
    """How this rank's entries come to stand: its own and those of others, by their last tokens.

    Args:
        ranks_per_node: neighbours that share a node; 0: one hop, straight from holder to reader.
    Returns:
        the routes of `bring_left`, from places among the rank's own entries to places among all
        that it reads; and the last token of each of these.
    """
    reads = runs.reads()
    # A long document has two pieces on every rank; how many are long changes no graph either.
    least = (2 * num_ranks + LEAST_ROOM) * runs.rows
    routes = node_routes(
        reads, runs.held, rank, num_ranks=num_ranks, ranks_per_node=ranks_per_node, least=least
    )
    return routes, runs.closing(reads, rank)
