"""Which keys each rank needs from each other rank: data, known before anything moves.

What a rank needs is the union of its queries' intervals, so a sliding window needs its halo,
packed documents need the parts of documents that cross shards, and a causal mask needs nothing
that lies ahead. No strategy has a rule of its own. Intervals and layouts are runs, and so is
what they come to: the work grows with documents and pieces, not with tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcp.kernels.softmax.block_ranges import KeyLine
from dtcp.sequence.arguments import check_rank
from dtcp.sequence.interval_runs import IntervalRuns
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.partition import (
    Ints,
    Partition,
    ascending_order,
    expand_tokens,
    intersections,
    merged_cuts,
    order_of_small,
    stops_of,
)


class PeerRuns(NamedTuple):
    """Runs of tokens that pass between this rank and others. Each field [R]."""

    peer: Ints
    start: Ints
    stop: Ints

    def counts(self, num_shards: int) -> Ints:
        """Tokens of each peer: [n]."""
        lengths = self.stop - self.start
        return np.bincount(self.peer, lengths, num_shards).astype(np.int64)

    def where(self, chosen: NDArray[np.bool_]) -> "PeerRuns":
        """Some of them."""
        return PeerRuns(*(x[chosen] for x in self))

    def sorted_by(self, key: Ints) -> "PeerRuns":
        """By a number for each peer, [n], then from left to right."""
        order = self._order(key)
        return self if order is None else PeerRuns(*(x[order] for x in self))

    def places(self, key: Ints) -> Ints:
        """Where the first token of each run comes to stand among all, once they are `sorted_by`."""
        order, length = self._order(key), self.stop - self.start
        if order is None:
            return length.cumsum() - length
        place, length = np.empty_like(length), length[order]
        place[order] = length.cumsum() - length
        return place

    def _order(self, key: Ints) -> Ints | None:
        """That of `sorted_by`; None where it is theirs already."""
        if not len(self.peer):
            return None
        number = key[self.peer]
        if ascending_order(self.start) is None:
            return order_of_small(number)
        return ascending_order(number * (int(self.start.max()) + 1) + self.start)

    def expanded(self, *, room: int) -> Tensor:
        """The tokens of all runs, one after another: [room] int32; nobody reads the rest."""
        return torch.from_numpy(expand_tokens(self.start, self.stop - self.start, room=room))


@dataclass(frozen=True, eq=False)
class RequiredKeys:
    """The keys that cross between this rank and the others."""

    send_slots: PeerRuns  # local slots, of others alone
    receive_tokens: PeerRuns  # token indices, of others alone
    own_tokens: PeerRuns
    own_slots: Ints  # of the first token of each own run


def required_keys(layout: SequenceLayout, rank: int, intervals: KeyIntervals) -> RequiredKeys:
    """Work out what this rank sends and receives; every rank finds its side of the same pairs."""
    check_rank(type(layout).__name__, rank, layout.num_shards)
    intervals.check_whole_rows(layout)
    keys_layout = intervals.layout_of_keys(layout)
    keys, mine = keys_layout.partition, keys_layout.partition.of_owner(rank)
    needed = _needed(layout, intervals)

    wanted = slice(*needed.peer.searchsorted([rank, rank + 1]))
    _, piece, start, stop = intersections(
        needed.start[wanted], needed.stop[wanted], keys.start, keys.stop
    )
    received = PeerRuns(keys.owner[piece], start, stop)
    received = received.where(received.peer != rank)

    own_start, own_stop, own_slot = (x[mine] for x in (keys.start, keys.stop, keys.slot))
    run, piece, start, stop = intersections(needed.start, needed.stop, own_start, own_stop)
    shift = (own_slot - own_start)[piece]
    sent = PeerRuns(needed.peer[run], start + shift, stop + shift)
    sent = sent.where(sent.peer != rank)
    own = PeerRuns(np.full_like(own_start, rank), own_start, own_stop)
    return RequiredKeys(sent, received, own, own_slot)


def needed_by_rank(partition: Partition, intervals: KeyIntervals, seq_len: int) -> PeerRuns:
    """The tokens that any query of each rank sees, as the fewest runs; by rank, ascending.

    On a run of tokens either end of the interval moves by a token at most, so that all it covers
    is one run of keys.
    """
    parts = [_covered(partition, runs) for runs in intervals.runs]
    rank, start, stop = (
        parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
    )
    # Ranks one after another on one line, with a token between them.
    offset = rank * (seq_len + 1)
    start, stop = start + offset, stop + offset
    order = ascending_order(start)
    if order is not None:
        start, stop, rank = start[order], stop[order], rank[order]
    np.maximum.accumulate(stop, out=stop)
    new = np.ones(len(start), dtype=bool)
    np.greater(start[1:], stop[:-1], out=new[1:])
    first = new.nonzero()[0]
    last = stops_of(first, len(start)) - 1
    rank = rank[first]
    offset = rank * (seq_len + 1)
    return PeerRuns(rank, start[first] - offset, stop[last] - offset)


def _needed(layout: SequenceLayout, intervals: KeyIntervals) -> PeerRuns:
    """`needed_by_rank`, remembered: a halo's room and its metadata are both worked out of it."""
    partition, memo = layout.partition, intervals.memo
    if partition not in memo:
        seq_len = intervals.layout_of_keys(layout).seq_len
        memo[partition] = needed_by_rank(partition, intervals, seq_len)
    return memo[partition]


def most_received(layout: SequenceLayout, intervals: KeyIntervals, *, limit: int) -> int:
    """The most keys that any rank requires of others; every rank finds the same number.

    Args:
        limit: where it is more than this by far, so that shards alone tell, something less is
            returned, but more than this.
    """
    keys_layout = intervals.layout_of_keys(layout)
    keys, n = keys_layout.partition, layout.num_shards
    needed = _needed(layout, intervals)
    # Its own are a shard at most.
    at_least = int(needed.counts(n).max(initial=0)) - keys_layout.shard_len
    if at_least > limit:
        return at_least
    by_owner = keys.by_owner
    own = KeyLine(keys.owner[by_owner], keys.start[by_owner], keys.stop[by_owner], n)
    mine = own.before(needed.peer, needed.stop) - own.before(needed.peer, needed.start)
    return int(np.bincount(needed.peer, needed.stop - needed.start - mine).max(initial=0))


def _covered(partition: Partition, runs: IntervalRuns) -> tuple[Ints, Ints, Ints]:
    """For each stretch of a rank's tokens that lies in one run: the rank, and the keys it sees.

    By rank, then from left to right.
    """
    first_token, piece, run = merged_cuts(partition.start, runs.start)
    last_token = stops_of(first_token, int(partition.stop[-1])) - 1
    # An end of an interval is a number of its run, and the token where it moves.
    first = (runs.first - runs.first_step * runs.start)[run] + runs.first_step[run] * first_token
    last = (runs.last - runs.last_step * runs.start)[run] + runs.last_step[run] * last_token
    owner = partition.owner[piece]
    order = partition.by_owner if len(owner) == len(partition.owner) else order_of_small(owner)
    count = np.bincount(owner)
    owner, first, last = np.arange(len(count)).repeat(count), first[order], last[order]
    seen = last >= first
    if seen.all():
        return owner, first, last + 1
    return owner[seen], first[seen], last[seen] + 1
