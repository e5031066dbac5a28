"""Keys in two hops: to each node that reads them, once, and from there to the ranks inside.

Of the ranks of a node that read a key of another node, one takes it in and hands it on to the
others. Who reads the same run of keys shares it out evenly, so that a node takes in over all of
its links; nobody takes in what it does not read, so that no byte moves more than before.

    nodes of 2, rank 0 holds keys 0-7, ranks 2 and 3 read them
    first hop      0 -> 2: 0-3     0 -> 3: 4-7
    second hop     3 -> 2: 4-7     2 -> 3: 0-3

Gradients go the same way back: what the readers of a node found is summed where the key came in.
All of it follows from the readers of every run, which every rank works out alike.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtcp.sequence.arguments import check_rank
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.partition import Ints, Partition, unique_ascending
from dtcp.softmax.required_keys import PeerRuns, needed_by_rank, required_keys

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class KeyHops:
    """One rank's part of bringing keys in at most two hops."""

    sent: PeerRuns  # local slots, in the first hop
    received: PeerRuns  # tokens, in the first hop
    onward: PeerRuns  # tokens that arrived in the first hop and go on in the second
    arriving: PeerRuns  # tokens, in the second hop
    own_tokens: PeerRuns
    own_slots: Ints
    room: int
    """Tokens that may go on from a rank: the same number on all of them."""


class _Segments(NamedTuple):
    """Runs of keys, each of one owner and one set of readers. Each field [K]."""

    start: Ints
    stop: Ints
    owner: Ints
    slot: Ints  # of the first token, in its owner's shard

    def where(self, chosen: Bools) -> "_Segments":
        return _Segments(*(x[chosen] for x in self))


def key_hops(
    layout: SequenceLayout, rank: int, intervals: KeyIntervals, *, ranks_per_node: int
) -> KeyHops:
    """What this rank sends, receives and hands on.

    Args:
        ranks_per_node: 0 or 1, or all ranks: one hop, straight from owner to reader.
    """
    n, m = layout.num_shards, ranks_per_node
    if m in (0, 1, n):
        required = required_keys(layout, rank, intervals)
        own = required.own_tokens, required.own_slots
        return KeyHops(required.send_slots, required.receive_tokens, NONE, NONE, *own, room=0)
    check_rank(type(layout).__name__, rank, n)
    intervals.check_whole_rows(layout)
    keys = intervals.layout_of_keys(layout)
    pieces, held = keys.partition, keys.partition.owner == rank
    runs = (pieces.owner[held], pieces.start[held], pieces.stop[held])
    own = PeerRuns(*runs), pieces.slot[held]
    needed = needed_by_rank(layout.partition, intervals, keys.seq_len)
    segments = _segments(keys.partition, needed, keys.seq_len)
    first = rank // m * m
    readers = _readers(segments.start, needed, first, m)
    inside = segments.owner // m == rank // m
    others = readers.copy()
    others[:, rank - first] = False

    mine = inside & (segments.owner != rank) & readers[:, rank - first]
    straight = segments.where(mine)
    far, far_readers, far_others = segments.where(~inside), readers[~inside], others[~inside]
    row, place, start, stop = _shares(far_readers, far.start, far.stop)
    here = place == rank - first
    landed = PeerRuns(far.owner[row[here]], start[here], stop[here])
    part, to = far_others[row[here]].nonzero()
    onward = PeerRuns(first + to, start[here][part], stop[here][part])
    brought = ~here & far_readers[row, rank - first]
    arriving = PeerRuns(first + place[brought], start[brought], stop[brought])
    # A run of k readers is cut into k parts of whole tokens, of which k - 1 copies go on: at most
    # its length and k - 2 tokens more from one rank.
    most = keys.seq_len - m * keys.shard_len + (m - 2) * len(segments.start)
    return KeyHops(
        _sent(segments.where(segments.owner == rank), needed, rank, n, m),
        _joined(PeerRuns(straight.owner, straight.start, straight.stop), landed),
        onward,
        arriving,
        *own,
        room=keys.seq_len if most <= keys.seq_len else 1 << (most - 1).bit_length(),
    )


def _segments(keys: Partition, needed: PeerRuns, seq_len: int) -> _Segments:
    start = unique_ascending(np.concatenate((keys.start, needed.start, needed.stop)))
    start = start[start < seq_len]
    piece = np.searchsorted(keys.start, start, side="right") - 1
    slot = keys.slot[piece] + start - keys.start[piece]
    return _Segments(start, np.append(start[1:], seq_len), keys.owner[piece], slot)


def _readers(start: Ints, needed: PeerRuns, first: int, count: int) -> Bools:
    """Who of `count` ranks from `first` on reads the segments that begin there: [K, count]."""
    chosen = (needed.peer >= first) & (needed.peer < first + count)
    rank = needed.peer[chosen] - first
    edges = np.zeros((len(start) + 1, count), dtype=np.int32)
    np.add.at(edges, (np.searchsorted(start, needed.start[chosen]), rank), 1)
    np.add.at(edges, (np.searchsorted(start, needed.stop[chosen]), rank), -1)
    return edges[:-1].cumsum(axis=0) > 0


def _shares(readers: Bools, start: Ints, stop: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Runs cut evenly for their readers in a node: run, place in the node, start, stop."""
    row, place = readers.nonzero()
    count = readers.sum(axis=1)[row]
    index: Ints = np.arange(len(row)) - np.searchsorted(row, row)
    length = (stop - start)[row]
    low, high = start[row] + length * index // count, start[row] + length * (index + 1) // count
    some = low < high
    return row[some], place[some], low[some], high[some]


def _sent(own: _Segments, needed: PeerRuns, rank: int, n: int, m: int) -> PeerRuns:
    """Local slots to the readers in this node, and to one reader for each part in every other."""
    nodes, here = n // m, rank // m
    readers = _readers(own.start, needed, 0, n).reshape(-1, nodes, m)
    row, place = readers[:, here].nonzero()
    other = here * m + place != rank
    row, peer = row[other], (here * m + place)[other]
    straight = PeerRuns(peer, own.slot[row], (own.slot + own.stop - own.start)[row])
    far = readers.copy()
    far[:, here] = False
    of_node, place, start, stop = _shares(
        far.reshape(-1, m), np.repeat(own.start, nodes), np.repeat(own.stop, nodes)
    )
    row, node = of_node // nodes, of_node % nodes
    shift = own.slot[row] - own.start[row]
    return _joined(straight, PeerRuns(node * m + place, start + shift, stop + shift))


def _joined(one: PeerRuns, other: PeerRuns) -> PeerRuns:
    return PeerRuns(*(np.concatenate(pair) for pair in zip(one, other, strict=True)))


NONE = PeerRuns(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
