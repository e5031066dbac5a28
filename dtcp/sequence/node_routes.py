"""Who sends which slots to whom where nodes are known: in one hop, or in two between nodes.

Ranks read stretches of a line, and each finds them at places of its own. What several ranks of a
node read, and no rank of it holds, comes to one of them, which hands it on inside the node; those
that read the same stretch take equal shares of it, so that a node receives over all of its links.

    nodes of 2, rank 0 holds 0-7, ranks 2 and 3 read them
    routes      0 -> 2: 0-3     0 -> 3: 4-7
    onward      3 -> 2: 4-7     2 -> 3: 0-3

The cost of all this grows with the stretches read, the pieces held and the ranks of a node.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.partition import Ints, Partition, differs, expand, overlaps, unique_ascending

LEAST_ROOM = 4
"""Hops, or stretches, that tables have room for at least, for each row of a batch."""

NOBODY = -1
"""The rank of a hop in `onward` where no rank hands anything on: the second hop is left out."""


class Reads(NamedTuple):
    """Stretches of a line that ranks read, and where these come to stand. Each field [R]."""

    rank: Ints
    start: Ints
    stop: Ints
    place: Ints  # of the first number of the stretch, among all that the rank reads

    def where(self, chosen: Ints) -> "Reads":
        return Reads(*(x[chosen] for x in self))


class NodeRoutes(NamedTuple):
    """One rank's part of bringing what all ranks read."""

    routes: Tensor
    """[2 (send, receive), hops, 3] int64: rank, slots it holds or places from and up to."""
    onward: Tensor
    """[2, hops, 3] likewise, from places of the first hop to places; no hops of one tier."""


class _Hops(NamedTuple):
    """Each field [H]."""

    source: Ints
    to: Ints
    slot: Ints  # at the source
    place: Ints  # at the receiver
    length: Ints

    def where(self, chosen: Ints) -> "_Hops":
        return _Hops(*(x[chosen] for x in self))

    def joined(self) -> "_Hops":
        """By receiver, source and place; what follows on at both ends is one hop."""
        hops = self.where(np.lexsort((self.place, self.source, self.to)))
        new = differs(hops.to) | differs(hops.source)
        for ends in (hops.slot, hops.place):
            new[1:] |= ends[1:] != ends[:-1] + hops.length[:-1]
        first = np.flatnonzero(new)
        length = np.add.reduceat(hops.length, first) if len(first) else hops.length
        return hops.where(first)._replace(length=length)


def node_routes(
    reads: Reads,
    held: Partition,
    rank: int,
    *,
    num_ranks: int,
    ranks_per_node: int = 0,
    least: int = LEAST_ROOM,
) -> NodeRoutes:
    """What this rank sends, receives and hands on.

    Args:
        held: who holds what of the line, from its left to its right.
        ranks_per_node: 0 or 1, or all ranks: one hop, straight from owner to reader.
        least: hops that there is room for in any case: where it is enough, batches share a graph.
    Returns:
        tables of as many hops on every rank, some of them empty.
    """
    none = np.zeros((2, 0, 3), dtype=np.int64)
    if ranks_per_node in (0, 1, num_ranks):
        straight = _straight(reads, held)
        table = _table(straight, rank, 0, least)
        return NodeRoutes(torch.from_numpy(table), torch.from_numpy(none))
    first, second = _two_hops(reads, held, ranks_per_node)
    padding = 0 if len(second.to) else NOBODY
    tables = _table(first, rank, 0, least), _table(second, rank, padding, least)
    return NodeRoutes(*(torch.from_numpy(table) for table in tables))


def _straight(reads: Reads, held: Partition) -> _Hops:
    read, piece = overlaps(reads.start, reads.stop, held.start, held.stop)
    low = np.maximum(reads.start[read], held.start[piece])
    length = np.minimum(reads.stop[read], held.stop[piece]) - low
    some = length > 0
    read, piece, low, length = read[some], piece[some], low[some], length[some]
    slot = held.slot[piece] + low - held.start[piece]
    place = reads.place[read] + low - reads.start[read]
    return _Hops(held.owner[piece], reads.rank[read], slot, place, length)


def _two_hops(reads: Reads, held: Partition, m: int) -> tuple[_Hops, _Hops]:
    """To the readers' nodes, or straight inside of one; and from there on."""
    parts = _parts(reads, held, m)
    near = held.owner[np.searchsorted(held.start, parts.start, side="right") - 1] // m
    far = parts.where(near != parts.rank // m)
    straight = parts.where(near == parts.rank // m)
    order = np.lexsort((far.place, far.rank, far.start, far.rank // m))
    far = far.where(order)
    # Of one part, the readers of a node follow each other.
    new = differs(far.rank // m) | differs(far.start)
    takes = new | differs(far.rank)
    part = np.cumsum(new) - 1
    first, taker = np.flatnonzero(new), np.flatnonzero(takes)
    of_part = part[taker]
    count = np.bincount(of_part, minlength=len(first))[of_part]
    turn = np.arange(len(taker)) - np.searchsorted(of_part, of_part)
    length = (far.stop - far.start)[taker]
    low, high = length * turn // count, length * (turn + 1) // count
    some = low < high
    taker, low, high, of_part = taker[some], low[some], high[some], of_part[some]
    share = Reads(
        far.rank[taker], far.start[taker] + low, far.start[taker] + high, far.place[taker] + low
    )
    arriving = _straight(Reads(*map(np.concatenate, zip(straight, share, strict=True))), held)
    # Each share goes on to all places of its part but the one where it came in.
    readers = np.bincount(part, minlength=len(first))[of_part]
    from_share, to = np.repeat(np.arange(len(taker)), readers), expand(first[of_part], readers)
    on = to != taker[from_share]
    from_share, to = from_share[on], to[on]
    onward = _Hops(
        share.rank[from_share],
        far.rank[to],
        share.place[from_share],
        far.place[to] + low[from_share],
        (high - low)[from_share],
    )
    return arriving, onward


def _parts(reads: Reads, held: Partition, m: int) -> Reads:
    """The reads, cut wherever one of the same node starts or ends, or a piece of that node does."""
    length = max(reads.stop.max(initial=0), held.stop.max(initial=0))
    of_reads, of_pieces = reads.rank // m * length, held.owner // m * length
    edges = unique_ascending(
        np.concatenate(
            (
                *(of_reads + x for x in (reads.start, reads.stop)),
                *(of_pieces + x for x in (held.start, held.stop)),
            )
        )
    )
    low, high = (np.searchsorted(edges, of_reads + x) for x in (reads.start, reads.stop))
    read, at = np.repeat(np.arange(len(low)), high - low), expand(low, high - low)
    start = edges[at] - of_reads[read]
    stop = start + edges[at + 1] - edges[at]
    place = reads.place[read] + start - reads.start[read]
    return Reads(reads.rank[read], start, stop, place)


def _table(hops: _Hops, rank: int, padding: int, least: int) -> Ints:
    """[2 (send, receive), hops, 3], both ends in one order; `padding` is the rank of empty hops."""
    hops = hops.joined()
    room = max(room_for(hops.to, least), room_for(hops.source, least))
    table = np.zeros((2, room, 3), dtype=np.int64)
    table[..., 0] = padding
    ends = ((hops.source, hops.to, hops.slot), (hops.to, hops.source, hops.place))
    for out, (own, peer, places) in zip(table, ends, strict=True):
        mine = np.flatnonzero(own == rank)
        mine = mine[np.lexsort((hops.place[mine], peer[mine]))]
        columns = (peer[mine], places[mine], places[mine] + hops.length[mine])
        out[: len(mine)] = np.stack(columns, axis=1)
    return table


def hands_on(onward: Tensor) -> bool:
    """Whether any rank has a second hop, of tables [..., 2, hops, 3]: the same on every rank."""
    return onward.shape[-2] > 0 and bool((onward[..., 0, 0] != NOBODY).any())


def room_for(ranks: Ints, least: int) -> int:
    """A power of two that what each rank has fits in, one number for each."""
    most = max(least, int(np.bincount(ranks).max(initial=0)))
    return 1 << (most - 1).bit_length()
