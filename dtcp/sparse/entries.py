"""Which finished entries go to which rank where pieces are of any lengths.

An entry lies with the last token of its window. A rank that holds tokens of a document needs the
document's entries up to the last of these, and no others; a document that one rank holds whole
sends none. Everything here grows with documents, pieces and the entries of one rank.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.partition import Ints, expand, overlaps
from dtcp.sequence.stretches import Stretches, room_for, with_room


@dataclass(frozen=True, eq=False)
class EntryRuns:
    """The entries of all ranks in the pieces that documents were cut into. Each field [F].

    Pieces stand from the left of the line of all rows to its right.
    """

    ratio: int
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
        return cls(ratio, document, first, start, owner, count, place)

    def wanted(self) -> tuple[Ints, Ints]:
        """Pairs of a rank and a piece whose entries it reads, its own among them; by rank."""
        count = len(self.owner)
        # A rank's last piece of each document, and all pieces of the document up to that.
        order = np.lexsort((np.arange(count), self.document, self.owner))
        owner, document = self.owner[order], self.document[order]
        ends = (owner[1:] != owner[:-1]) | (document[1:] != document[:-1])
        last = order[np.append(ends, True)[:count]]
        first = np.searchsorted(self.document, self.document[last])
        length = last - first + 1
        return np.repeat(self.owner[last], length), expand(first, length)

    def closing(self, pieces: Ints) -> Ints:
        """The last token of each entry of some pieces, in their order."""
        first, start = self.document_start[pieces], self.start[pieces]
        number = expand((start - first) // self.ratio, self.count[pieces])
        return np.repeat(first, self.count[pieces]) + self.ratio * (number + 1) - 1


def entry_route(runs: EntryRuns, rank: int) -> tuple[Tensor, Ints]:
    """How this rank's entries come to stand: its own and those of others, by their last tokens.

    Returns:
        the route [1, 2 (send, receive), hops, 3] int64 of `bring_left`, from places among the
        rank's own entries to places among all that it reads; and the last token of each of these.
    """
    to, piece = runs.wanted()
    some = runs.count[piece] > 0
    to, piece = to[some], piece[some]
    holder, place, length = runs.owner[piece], runs.place[piece], runs.count[piece]
    before = np.cumsum(length) - length
    at = before - before[np.searchsorted(to, to)]
    # Neighbours among the holder's entries that go to neighbouring places are one hop.
    new = np.ones(len(to), dtype=bool)
    new[1:] = (to[1:] != to[:-1]) | (holder[1:] != holder[:-1])
    new[1:] |= place[1:] != place[:-1] + length[:-1]
    first = np.flatnonzero(new)
    length_of_hop = np.add.reduceat(length, first) if len(first) else length
    hop_to, hop_holder, place, at = (x[first] for x in (to, holder, place, at))
    room = max(room_for(hop_to), room_for(hop_holder))
    sides = []
    for own, peer, begin in ((hop_holder, hop_to, place), (hop_to, hop_holder, at)):
        mine = np.flatnonzero(own == rank)
        mine = mine[np.lexsort((at[mine], peer[mine]))]
        hops = np.stack((peer[mine], begin[mine], begin[mine] + length_of_hop[mine]), axis=1)
        sides.append(with_room(hops, room, 0))
    return torch.from_numpy(np.stack(sides))[None], runs.closing(piece[to == rank])
