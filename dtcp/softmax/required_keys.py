"""Which keys each rank needs from each other rank: data, known before anything moves.

Step s of n pairs every rank r with the ranks s places away: r receives from r - s and sends to
r + s. What rank r needs from a shard is the union of its queries' intervals over the shard's
positions, so a sliding window needs its halo, packed documents need the parts of documents that
cross shards, and a causal mask needs nothing that lies ahead. No strategy has a rule of its own.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.softmax.block_ranges import TILE, UNUSED, block_ranges
from dtcp.mixer import position_ids_of
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.masks import Coords, Mask
from dtcp.softmax.style import AttentionShape, AttentionStyle, Received


class KeyExchangeMetadata(NamedTuple):
    """What a strategy that exchanges keys reads: for one mask, one layout, one rank.

    As in all tables, int32 goes to the device of the batch and int64 stays on the host.
    """

    first_key: Tensor  # [B, L] int32
    last_key: Tensor  # [B, L] int32
    send_slot: Tensor  # [(n - 1) * L] int32: local slots to send, peer after peer, then zeros
    counts: Tensor  # [2, n] int64: tokens sent and received, a peer or step each
    sort_by_index: Tensor  # [K] int32: local and received keys in ascending position (all at once)
    key_token_index: Tensor  # [parts, K] int32, UNUSED beyond the keys
    spans: Tensor  # [parts, B, tiles, 6] int64


class NeededKeysAttention(AttentionStyle):
    """A strategy that brings to each rank the keys its queries need, and no others."""

    def received(
        self,
        layout: SequenceLayout,
        rank: int,
        intervals: tuple[Tensor, Tensor],
        shape: AttentionShape,
    ) -> Received:
        return keys_received(layout, rank, intervals, shape)

    def value_only_metadata(
        self, mask: Mask, coords: Coords, layout: SequenceLayout, rank: int
    ) -> tuple[Tensor, ...]:
        metadata = KeyExchangeMetadata(*self.collect_metadata(mask, coords, layout, rank))
        token_index = position_ids_of(coords)
        return (
            *metadata,
            layout.shard(token_index, rank).contiguous(),
            _at_keys(token_index, metadata),
        )


def _at_keys(token_index: Tensor, metadata: KeyExchangeMetadata) -> Tensor:
    """What [B, S] says of the keys of each part: [parts, B, K], anything where there is none."""
    return token_index[:, metadata.key_token_index.clamp(min=0).long()].transpose(0, 1).contiguous()


@dataclass(frozen=True)
class RequiredKeys:
    """The keys that cross between this rank and the others, step by step."""

    send_slots: list[Tensor]  # n of [<= L], local slots, ascending; step 0 is empty
    receive_positions: list[Tensor]  # n of [<= L], ascending; step 0: this rank's own

    @property
    def received_tokens(self) -> int:
        return sum(x.numel() for x in self.receive_positions[1:])


def required_keys(
    layout: SequenceLayout, rank: int, first_key: Tensor, last_key: Tensor
) -> RequiredKeys:
    """Work out what this rank sends and receives; every rank finds its side of the same pairs.

    Args:
        first_key, last_key: [B, S] in position order, the whole row's.
    """
    n = layout.num_shards
    positions = [layout.token_indices(r) for r in range(n)]
    mine = positions[rank]
    wanted = _union(first_key[:, mine], last_key[:, mine], layout.seq_len)  # [S] bool
    receive, send = [mine], [mine[:0]]
    asked = keys_requested_by(layout, rank, first_key, last_key)  # [n, L] bool
    for step in range(1, n):
        theirs = positions[(rank - step) % n]
        receive.append(theirs[wanted[theirs]])
        send.append(asked[(rank + step) % n].nonzero().flatten())
    return RequiredKeys(send, receive)


def keys_received(
    layout: SequenceLayout,
    rank: int,
    intervals: tuple[Tensor, Tensor],
    shape: AttentionShape,
) -> Received:
    """Needed keys come forward and again backward, and gradients of sent keys come home."""
    found = required_keys(layout, rank, *intervals)
    sent = sum(x.numel() for x in found.send_slots)
    keys = found.received_tokens * shape.key_row
    return Received(keys, keys + sent * shape.key_row)


def all_gather_metadata(
    layout: SequenceLayout,
    rank: int,
    intervals: tuple[Tensor, Tensor],
    *,
    capacity: int | None = None,
    tile: int = TILE,
) -> KeyExchangeMetadata:
    """Tables to bring every needed key before attending: one run of keys by position.

    Args:
        capacity: most keys this can ever be, so that shapes stay the same from batch to batch;
            None for the whole sequence.
    """
    found = required_keys(layout, rank, *intervals)
    first, last = _local(layout, rank, intervals)
    # One all_to_all goes by rank, not by step: own keys first, then from rank 0 up.
    n = layout.num_shards
    receive = [found.receive_positions[(rank - peer) % n] for peer in range(n)]
    send = [found.send_slots[(peer - rank) % n] for peer in range(n)]
    own, receive[rank] = receive[rank], receive[rank][:0]
    token_index, sort_by_index = torch.cat([own, *receive]).sort()
    capacity = layout.seq_len if capacity is None else capacity
    spans = block_ranges(first, last, token_index, tile=tile)
    return KeyExchangeMetadata(
        first,
        last,
        _filled(torch.cat(send), layout.seq_len - layout.shard_len, 0),
        _sizes(send, receive),
        _filled(sort_by_index, capacity, 0),
        _filled(token_index, capacity, UNUSED)[None],
        spans[None],
    )


def ring_metadata(
    layout: SequenceLayout,
    rank: int,
    intervals: tuple[Tensor, Tensor],
    *,
    tile: int = TILE,
) -> KeyExchangeMetadata:
    """Tables to attend to the keys of each step as they arrive: n runs of keys."""
    found = required_keys(layout, rank, *intervals)
    first, last = _local(layout, rank, intervals)
    steps = found.receive_positions
    return KeyExchangeMetadata(
        first,
        last,
        _filled(torch.cat(found.send_slots), layout.seq_len - layout.shard_len, 0),
        _sizes(found.send_slots, [found.receive_positions[0][:0], *found.receive_positions[1:]]),
        torch.zeros(0, dtype=torch.int32),
        torch.stack([_filled(x, layout.shard_len, UNUSED) for x in steps]),
        torch.stack([block_ranges(first, last, x, tile=tile) for x in steps]),
    )


def _local(
    layout: SequenceLayout, rank: int, intervals: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    first, last = (layout.shard(x, rank) for x in intervals)
    return first.contiguous(), last.contiguous()


def _sizes(send: list[Tensor], receive: list[Tensor]) -> Tensor:
    return torch.tensor([[x.numel() for x in send], [x.numel() for x in receive]])


def _filled(x: Tensor, length: int, value: int) -> Tensor:
    """x, followed by `value` up to a length that no batch exceeds: shapes never change."""
    filled = torch.nn.functional.pad(x, (0, length - x.numel()), value=value)
    return filled.to(torch.int32)


def _union(first: Tensor, last: Tensor, seq_len: int) -> Tensor:
    """Positions inside any of the intervals: [S] bool."""
    some = last >= first
    edges = torch.zeros(seq_len + 1, dtype=torch.int64)
    first, last = first[some].to(torch.int64), last[some].to(torch.int64)
    edges.index_add_(0, first, torch.ones_like(first))
    edges.index_add_(0, last + 1, -torch.ones_like(last))
    return edges[:-1].cumsum(0) > 0


def keys_requested_by(
    layout: SequenceLayout, rank: int, first_key: Tensor, last_key: Tensor
) -> Tensor:
    """Which of this rank's keys each rank needs: [n, L] bool, by local slot.

    All queries' intervals are cut down to this shard's positions, so the work is O(S log L).
    """
    n, length = layout.num_shards, layout.shard_len
    mine = layout.token_indices(rank)  # ascending
    owner = torch.empty(layout.seq_len, dtype=torch.int64)
    owner[layout.permutation()] = torch.arange(n).repeat_interleave(length)
    first, last = (x.to(torch.int64).contiguous() for x in (first_key, last_key))
    start = torch.searchsorted(mine, first)
    stop = torch.searchsorted(mine, last, right=True)
    some = start < stop
    row = owner.expand_as(first)[some] * (length + 1)
    edges = torch.zeros(n * (length + 1), dtype=torch.int64)
    ones = torch.ones_like(row)
    edges.index_add_(0, row + start[some], ones)
    edges.index_add_(0, row + stop[some], -ones)
    return edges.view(n, length + 1)[:, :-1].cumsum(1) > 0
