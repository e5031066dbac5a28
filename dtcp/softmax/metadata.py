"""What attention reads of a batch: on one device, and where keys are exchanged between ranks."""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from dtcp.kernels.softmax.block_ranges import TILE, UNUSED, block_ranges
from dtcp.kernels.softmax.pieces import find_pieces, no_pieces
from dtcp.metadata import AttentionMetadata, HostTensor
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.required_keys import required_keys


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.int32)


@dataclass(frozen=True, eq=False)
class LocalMetadata(AttentionMetadata):
    """What attention on one device reads, for one mask and one batch."""

    first_key: Tensor  # [B, S] int32, first and last token that each query sees
    last_key: Tensor  # [B, S] int32
    key_token_index: Tensor  # [S] int32
    block_ranges: HostTensor  # [B, tiles, 6] int64
    position_ids: Tensor = field(default_factory=_none)  # [B, S] int32, for keys made from values
    pieces: HostTensor = field(default_factory=no_pieces)  # [C, 9] int64, of find_pieces


@dataclass(frozen=True, eq=False)
class KeyExchangeMetadata(AttentionMetadata):
    """What a strategy that exchanges keys reads: for one mask, one layout, one rank."""

    first_key: Tensor  # [B, L] int32, first and last token that each query sees
    last_key: Tensor  # [B, L] int32
    send_slot: Tensor  # [(n - 1) * L] int32: local slots to send, peer after peer, then zeros
    counts: HostTensor  # [2, n] int64: tokens sent and received, of each peer or step
    order: Tensor  # [K] int32: local and received keys in token order (all at once)
    key_token_index: Tensor  # [parts, K] int32, UNUSED beyond the keys
    block_ranges: HostTensor  # [parts, B, tiles, 6] int64
    position_ids: Tensor = field(default_factory=_none)  # [B, L] int32, for keys made from values
    key_position_ids: Tensor = field(default_factory=_none)  # [parts, B, K] int32, likewise
    pieces: HostTensor = field(default_factory=no_pieces)  # [parts, C, 9] int64, of find_pieces

    def with_position_ids(self, position_ids: Tensor, layout: SequenceLayout, rank: int) -> Self:
        """The same, for keys that are made from values where they arrive.

        Args:
            position_ids: [B, S] of the whole rows.
        """
        keys = self.key_token_index.clamp(min=0).long()
        return replace(
            self,
            position_ids=layout.shard(position_ids, rank).contiguous(),
            key_position_ids=position_ids[:, keys].transpose(0, 1).contiguous(),
        )


def local_metadata(first_key: Tensor, last_key: Tensor, *, tile: int = TILE) -> LocalMetadata:
    """Metadata of whole rows in token order, from the intervals of a mask: [B, S] each."""
    token_index = torch.arange(first_key.shape[1], dtype=torch.int32)
    ranges = block_ranges(first_key, last_key, token_index, tile=tile)
    pieces = find_pieces(first_key, last_key, token_index, tiles=ranges.shape[1])
    return LocalMetadata(first_key, last_key, token_index, ranges, pieces=pieces)


def all_gather_metadata(
    layout: SequenceLayout,
    rank: int,
    intervals: tuple[Tensor, Tensor],
    *,
    capacity: int | None = None,
    tile: int = TILE,
) -> KeyExchangeMetadata:
    """Metadata to bring every required key before attending: one run of keys in token order.

    Args:
        capacity: most keys this can ever be, so that shapes stay the same from batch to batch;
            None for the whole sequence.
    """
    required = required_keys(layout, rank, *intervals)
    first, last = _local(layout, rank, intervals)
    # One all_to_all goes by rank, not by step: own keys first, then from rank 0 up.
    n = layout.num_shards
    receive = [required.receive_tokens[(rank - peer) % n] for peer in range(n)]
    send = [required.send_slots[(peer - rank) % n] for peer in range(n)]
    own, receive[rank] = receive[rank], receive[rank][:0]
    token_index, order = torch.cat([own, *receive]).sort()
    capacity = layout.seq_len if capacity is None else capacity
    ranges = block_ranges(first, last, token_index, tile=tile)
    return KeyExchangeMetadata(
        first,
        last,
        _filled(torch.cat(send), layout.seq_len - layout.shard_len, 0),
        _sizes(send, receive),
        _filled(order, capacity, 0),
        _filled(token_index, capacity, UNUSED)[None],
        ranges[None],
        pieces=find_pieces(first, last, token_index, tiles=ranges.shape[1])[None],
    )


def ring_metadata(
    layout: SequenceLayout,
    rank: int,
    intervals: tuple[Tensor, Tensor],
    *,
    tile: int = TILE,
) -> KeyExchangeMetadata:
    """Metadata to attend to the keys of each step as they arrive: n runs of keys."""
    required = required_keys(layout, rank, *intervals)
    first, last = _local(layout, rank, intervals)
    steps = required.receive_tokens
    ranges = torch.stack([block_ranges(first, last, x, tile=tile) for x in steps])
    pieces = [find_pieces(first, last, x, tiles=ranges.shape[2]) for x in steps]
    return KeyExchangeMetadata(
        first,
        last,
        _filled(torch.cat(required.send_slots), layout.seq_len - layout.shard_len, 0),
        _sizes(required.send_slots, [required.receive_tokens[0][:0], *required.receive_tokens[1:]]),
        torch.zeros(0, dtype=torch.int32),
        torch.stack([_filled(x, layout.shard_len, UNUSED) for x in steps]),
        ranges,
        pieces=torch.stack(pieces),
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
