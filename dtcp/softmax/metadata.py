"""What attention reads of a batch: on one device, and where keys are exchanged between ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcp.kernels.softmax.block_ranges import TILE, KeyLine, block_ranges_of_parts
from dtcp.kernels.softmax.pieces import no_pieces, pieces_of_parts
from dtcp.kernels.softmax.types import Keys
from dtcp.metadata import AttentionMetadata, HostTensor, no_indices
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.partition import Ints, expand_tokens, joined_neighbours
from dtcp.sequence.slot_runs import SlotRuns
from dtcp.softmax.key_hops import KeyHops, key_hops
from dtcp.softmax.positions import TokenPositions
from dtcp.softmax.required_keys import required_keys


def _no_counts() -> Tensor:
    return torch.zeros(2, 0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class LocalMetadata(AttentionMetadata):
    """What attention on one device reads, for one mask and one batch."""

    # [B, S] int32, first and last token that each query sees; of several intervals [I, B, S]
    first_key: Tensor
    last_key: Tensor
    key_token_index: Tensor  # [S] int32
    block_ranges: HostTensor  # [B, tiles, 6] int64; likewise [I, B, tiles, 6]
    position_ids: Tensor = field(default_factory=no_indices)  # [B, S] int32; of keys from values
    pieces: HostTensor = field(default_factory=no_pieces)  # [C, 9] int64, of find_pieces; [I, C, 9]
    query_token_index: Tensor = field(default_factory=no_indices)  # [S] int32

    @property
    def sees(self) -> Tensor:
        """Which queries see any key: [B, S]."""
        return _sees(self.first_key, self.last_key)


@dataclass(frozen=True, eq=False)
class KeyExchangeMetadata(AttentionMetadata):
    """What a strategy that exchanges keys reads: for one mask, one layout, one rank."""

    # [B, L] int32, first and last token that each query sees; of several intervals [I, B, L]
    first_key: Tensor
    last_key: Tensor
    send_slot: Tensor  # [(n - 1) * L] int32: local slots to send, by peer; nobody reads the rest
    counts: HostTensor  # [2, n] int64: tokens sent and received, of each peer or step
    order: Tensor  # [K] int32: local and received keys in token order (all at once)
    key_token_index: Tensor  # [parts, K] int32; nobody reads what stands behind a part's keys
    block_ranges: HostTensor  # [parts, B, tiles, 6] int64; likewise [parts, I, B, tiles, 6]
    position_ids: Tensor = field(default_factory=no_indices)  # [B, L] int32; of keys from values
    # [parts, B, K] int32, of keys from values; nobody reads what stands behind a part's keys
    key_position_ids: Tensor = field(default_factory=no_indices)
    # [parts, C, 9] int64, of find_pieces; likewise [parts, I, C, 9]
    pieces: HostTensor = field(default_factory=no_pieces)
    query_token_index: Tensor = field(default_factory=no_indices)  # [L] int32
    # Of keys that came in from other nodes and go on inside this one; empty where none do.
    onward: Tensor = field(default_factory=no_indices)  # int32, which of the received, by peer
    onward_counts: HostTensor = field(default_factory=_no_counts)  # [2, n] int64, as counts

    def keys_of(self, part: int, k: Tensor, v: Tensor) -> Keys:
        """The keys and values of a part [B, m, G, ..] with what is known of them."""
        token_index = self.key_token_index[part, : k.shape[1]]
        return Keys(k, v, token_index, self.block_ranges[part], self.pieces[part])

    @property
    def moved(self) -> Tensor:
        """Tokens sent to and received from each peer in both hops: [2, n]."""
        return self.counts + self.onward_counts if self.onward_counts.numel() else self.counts

    @property
    def own_keys(self) -> int:
        """How many keys this rank has by itself."""
        others = self.counts.shape[1] - 1
        return self.send_slot.numel() // others if others else self.key_token_index.shape[1]

    @property
    def key_counts(self) -> list[int]:
        """How many keys each part has: this rank's own are in the first one."""
        counts = self.moved[1].view(len(self.key_token_index), -1).sum(1)
        counts[0] += self.own_keys
        return counts.tolist()

    @property
    def key_order(self) -> Tensor:
        """Where each key in token order comes from: the local ones, then the received ones."""
        return self.order[: self.own_keys + int(self.moved[1].sum())]

    @property
    def kept_rows(self) -> int | None:
        """Room for what arrives, where it is bounded below all other shards; None where not.

        The same on every rank, and in most batches: only shapes are read.
        """
        room = self.order.numel() - self.own_keys
        bounded = room < self.send_slot.numel() or room <= self.own_keys
        return room if room > 0 and bounded else None

    @property
    def sees(self) -> Tensor:
        """Which local queries see any key: [B, L]."""
        sees = _sees(self.first_key, self.last_key)
        return sees.view(self.position_ids.shape) if self.in_line else sees

    def with_position_ids(
        self, positions: TokenPositions, layout: SequenceLayout, rank: int
    ) -> Self:
        """The same, for keys that are made from values where they arrive."""
        own = positions.own(layout, rank)
        return replace(self.with_key_position_ids(positions), position_ids=own)

    def with_key_position_ids(self, positions: TokenPositions) -> Self:
        """The same, where queries are rotated before they come to these keys."""
        tokens = self.key_token_index.numpy()
        rows = 1 if self.in_line else positions.rows
        table = torch.empty(len(tokens), rows, tokens.shape[1], dtype=torch.int32)
        for part, count in enumerate(self.key_counts):
            if count:  # only what is used is looked up
                out = table[part, :, :count].numpy()
                positions.at(tokens[part, :count], in_line=self.in_line, out=out)
        return replace(self, key_position_ids=table)


def local_metadata(
    intervals: KeyIntervals, *, num_keys: int | None = None, tile: int = TILE
) -> LocalMetadata:
    """Metadata of whole rows in token order, from the intervals of a mask.

    Args:
        num_keys: of another sequence; None for the queries' own.
    """
    rows = [SlotRuns.whole(runs) for runs in intervals.runs]
    first, last = intervals.whole()
    seq_len = first.shape[-1]
    num_keys = seq_len if num_keys is None else num_keys
    start = np.zeros(1, dtype=np.int64)
    keys = KeyLine(start, start, start + num_keys, 1)
    (ranges,), (pieces,) = ranges_and_pieces(rows, keys, intervals, tile=tile)
    return LocalMetadata(
        first_key=first,
        last_key=last,
        key_token_index=torch.arange(num_keys, dtype=torch.int32),
        block_ranges=ranges,
        pieces=pieces,
        query_token_index=torch.arange(seq_len, dtype=torch.int32),
    )


def all_gather_metadata(
    layout: SequenceLayout,
    rank: int,
    intervals: KeyIntervals,
    *,
    capacity: int | None = None,
    tile: int = TILE,
    ranks_per_node: int = 0,
) -> KeyExchangeMetadata:
    """Metadata to bring every required key before attending: one run of keys in token order.

    Args:
        capacity: most keys this can ever be, so that shapes stay the same from batch to batch;
            None for the whole sequence.
        ranks_per_node: neighbours that share a node, as of `key_hops`.
    """
    hops = key_hops(layout, rank, intervals, ranks_per_node=ranks_per_node)
    keys_layout = intervals.layout_of_keys(layout)
    n, local_len, seq_len = layout.num_shards, keys_layout.shard_len, keys_layout.seq_len
    capacity = seq_len if capacity is None else capacity
    # One all_to_all goes by rank, not by step: own keys first, then from rank 0 up.
    by_rank = np.arange(n)
    sent, received, arriving = hops.sent.sorted_by(by_rank), hops.received, hops.arriving
    counts = np.array((sent.counts(n), received.counts(n)))
    first_hop, second_hop = local_len, local_len + int(counts[1].sum())
    starts = np.concatenate((hops.own_tokens.start, received.start, arriving.start))
    stops = np.concatenate((hops.own_tokens.stop, received.stop, arriving.stop))
    brought = (first_hop + received.places(by_rank), second_hop + arriving.places(by_rank))
    places = np.concatenate((hops.own_slots, *brought))
    by_token = starts.argsort(kind="stable")  # which merges ascending runs
    starts, stops, places = starts[by_token], stops[by_token], places[by_token]
    order = expand_tokens(places, stops - starts, room=capacity)
    rows, first, last = local_runs(layout, rank, intervals)
    starts, stops = joined_neighbours(starts, stops)
    tokens = expand_tokens(starts, stops - starts, room=capacity)
    keys = KeyLine(np.zeros_like(starts), starts, stops, 1)
    ranges, pieces = ranges_and_pieces(rows, keys, intervals, tile=tile)
    metadata = KeyExchangeMetadata(
        first_key=first,
        last_key=last,
        send_slot=sent.expanded(room=seq_len - local_len),
        counts=torch.from_numpy(counts),
        order=torch.from_numpy(order),
        key_token_index=torch.from_numpy(tokens)[None],
        block_ranges=ranges,
        pieces=pieces,
        query_token_index=torch.from_numpy(layout.partition.tokens(rank)),
    )
    return _handed_on(metadata, hops, by_rank) if hops.room else metadata


def _handed_on(metadata: KeyExchangeMetadata, hops: KeyHops, by_rank: Ints) -> KeyExchangeMetadata:
    """The same, and where the tokens that go on inside a node stand among the received ones."""
    onward, received = hops.onward.sorted_by(by_rank), hops.received
    counts = np.array([x.counts(len(by_rank)) for x in (onward, hops.arriving)])
    place = np.zeros(0, dtype=np.int64)
    if len(onward.start):
        by_token = received.start.argsort()
        run = by_token[received.start[by_token].searchsorted(onward.start, side="right") - 1]
        place = received.places(by_rank)[run] + onward.start - received.start[run]
    index = expand_tokens(place, onward.stop - onward.start, room=hops.room)
    return replace(metadata, onward=torch.from_numpy(index), onward_counts=torch.from_numpy(counts))


def ring_metadata(
    layout: SequenceLayout, rank: int, intervals: KeyIntervals, *, tile: int = TILE
) -> KeyExchangeMetadata:
    """Metadata to attend to the keys of each step as they arrive: n runs of keys.

    Step s of n pairs every rank r with the ranks s places away: r receives from r - s and sends to
    r + s.
    """
    required, keys_layout = required_keys(layout, rank, intervals), intervals.layout_of_keys(layout)
    n, local_len = layout.num_shards, keys_layout.shard_len
    ahead, back = (np.arange(n) - rank) % n, (rank - np.arange(n)) % n
    sent = required.send_slots.sorted_by(ahead)
    received = required.receive_tokens.sorted_by(back)
    starts = np.concatenate((required.own_tokens.start, received.start))
    stops = np.concatenate((required.own_tokens.stop, received.stop))
    step = np.concatenate((np.zeros_like(required.own_slots), back[received.peer]))
    counts = np.array((sent.counts(n)[ahead.argsort()], received.counts(n)[back.argsort()]))
    rows, first, last = local_runs(layout, rank, intervals)
    tokens = expand_tokens(starts, stops - starts)
    keys = KeyLine(step, starts, stops, n)
    ranges, pieces = ranges_and_pieces(rows, keys, intervals, tile=tile)
    return KeyExchangeMetadata(
        first_key=first,
        last_key=last,
        send_slot=sent.expanded(room=keys_layout.seq_len - local_len),
        counts=torch.from_numpy(counts),
        order=no_indices(),
        key_token_index=by_part(tokens, [local_len, *counts[1, 1:].tolist()], local_len),
        block_ranges=ranges,
        pieces=pieces,
        query_token_index=torch.from_numpy(layout.partition.tokens(rank)),
    )


def _sees(first_key: Tensor, last_key: Tensor) -> Tensor:
    """Which queries see any key: [B, L]."""
    sees = last_key >= first_key
    return sees.any(0) if sees.ndim == 3 else sees


def ranges_and_pieces(
    rows: Sequence[SlotRuns], keys: KeyLine, intervals: KeyIntervals, *, tile: int
) -> tuple[Tensor, Tensor]:
    """What kernels read of the keys of each part: of `intervals`, cut to `rows`."""
    ranges = block_ranges_of_parts(rows, keys, tile=tile)
    tiles, num_rows = ranges.shape[2], intervals.rows
    pieces = [
        pieces_of_parts(rows[start : start + num_rows], keys, tiles=tiles)
        for start in range(0, len(rows), num_rows)
    ]
    table = pieces[0] if len(pieces) == 1 else torch.stack(pieces, dim=1)
    return intervals.stacked(ranges, dim=1), table


def local_runs(
    layout: SequenceLayout, rank: int, intervals: KeyIntervals
) -> tuple[list[SlotRuns], Tensor, Tensor]:
    """What this rank's slots see: as `intervals.runs`, and the ends of these, [B, L]."""
    rows = [SlotRuns.of(runs, layout.partition, rank) for runs in intervals.runs]
    by_slot = zip(*(row.by_slot() for row in rows), strict=True)
    # One row, as most batches have, is taken as it is.
    first, last = (torch.from_numpy(x[0][None] if len(x) == 1 else np.stack(x)) for x in by_slot)
    return rows, intervals.stacked(first), intervals.stacked(last)


def by_part(x: NDArray[np.int32], counts: Sequence[int], length: int) -> Tensor:
    """x cut into parts of so many, each followed by zeros: [parts, length]."""
    parts, done = np.zeros((len(counts), length), dtype=np.int32), 0
    for part, count in enumerate(counts):
        if count:
            parts[part, :count] = x[done : done + count]
        done += count
    return torch.from_numpy(parts)
