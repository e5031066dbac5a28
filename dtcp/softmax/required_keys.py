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
from torch import Tensor

from dtcp.kernels.softmax.block_ranges import KeyLine
from dtcp.sequence.arguments import check_rank
from dtcp.sequence.interval_runs import IntervalRuns, Intervals, KeyIntervals
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.partition import (
    Ints,
    Partition,
    expand_tokens,
    overlaps,
    stops_of,
    unique_ascending,
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

    def sorted_by(self, key: Ints) -> "PeerRuns":
        """By a number for each peer, [n], then from left to right."""
        order = np.lexsort((self.start, key[self.peer]))
        return PeerRuns(*(x[order] for x in self))

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


def required_keys(layout: SequenceLayout, rank: int, intervals: Intervals) -> RequiredKeys:
    """Work out what this rank sends and receives; every rank finds its side of the same pairs."""
    check_rank(type(layout).__name__, rank, layout.num_shards)
    intervals = KeyIntervals.read_off(intervals)
    intervals.check_whole_rows(layout)
    keys_layout = intervals.layout_of_keys(layout)
    keys, mine = keys_layout.partition, keys_layout.partition.owner == rank
    needed = needed_by_rank(layout.partition, intervals, keys_layout.seq_len)

    wanted = needed.peer == rank
    run, piece = overlaps(needed.start[wanted], needed.stop[wanted], keys.start, keys.stop)
    start = np.maximum(needed.start[wanted][run], keys.start[piece])
    stop = np.minimum(needed.stop[wanted][run], keys.stop[piece])
    received = PeerRuns(keys.owner[piece], start, stop)
    received = PeerRuns(*(x[received.peer != rank] for x in received))

    own_start, own_stop, own_slot = (x[mine] for x in (keys.start, keys.stop, keys.slot))
    others = PeerRuns(*(x[~wanted] for x in needed))
    run, piece = overlaps(others.start, others.stop, own_start, own_stop)
    start = np.maximum(others.start[run], own_start[piece])
    stop = np.minimum(others.stop[run], own_stop[piece])
    shift = own_slot[piece] - own_start[piece]
    sent = PeerRuns(others.peer[run], start + shift, stop + shift)
    own = PeerRuns(np.full_like(own_start, rank), own_start, own_stop)
    return RequiredKeys(sent, received, own, own_slot)


def needed_by_rank(partition: Partition, intervals: KeyIntervals, seq_len: int) -> PeerRuns:
    """The tokens that any query of each rank sees, as the fewest runs; by rank, ascending.

    On a run of tokens either end of the interval moves by a token at most, so that all it covers
    is one run of keys.
    """
    parts = [_covered(partition, runs) for runs in intervals.rows]
    rank, start, stop = (np.concatenate(x) for x in zip(*parts, strict=True))
    # Ranks one after another on one line, with a token between them.
    offset = rank * (seq_len + 1)
    order = (start + offset).argsort()
    offset, start, stop = offset[order], (start + offset)[order], (stop + offset)[order]
    reached = np.maximum.accumulate(stop)
    new = np.ones(len(start), dtype=bool)
    new[1:] = start[1:] > reached[:-1]
    first = new.nonzero()[0]
    last = stops_of(first, len(start)) - 1
    offset = offset[first]
    return PeerRuns(offset // (seq_len + 1), start[first] - offset, reached[last] - offset)


def most_received(layout: SequenceLayout, intervals: KeyIntervals) -> int:
    """The most keys that any rank requires of others; every rank finds the same number."""
    keys_layout = intervals.layout_of_keys(layout)
    keys, n = keys_layout.partition, layout.num_shards
    needed = needed_by_rank(layout.partition, intervals, keys_layout.seq_len)
    by_owner = np.lexsort((keys.start, keys.owner))
    own = KeyLine(keys.owner[by_owner], keys.start[by_owner], keys.stop[by_owner], n)
    mine = own.before(needed.peer, needed.stop) - own.before(needed.peer, needed.start)
    return int(np.bincount(needed.peer, needed.stop - needed.start - mine).max(initial=0))


def _covered(partition: Partition, runs: IntervalRuns) -> tuple[Ints, Ints, Ints]:
    """For each stretch of a rank's tokens that lies in one run: the rank, and the keys it sees."""
    first_token = unique_ascending(np.concatenate((partition.start, runs.start)))
    last_token = stops_of(first_token, int(partition.stop[-1])) - 1
    owner = partition.owner[partition.start.searchsorted(first_token, side="right") - 1]
    start, _ = runs.at(first_token)
    _, stop = runs.at(last_token)
    seen = stop >= start
    return owner[seen], start[seen], stop[seen] + 1
