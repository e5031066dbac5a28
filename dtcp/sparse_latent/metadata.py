"""Which tokens each query may read, worked out on the host: of its document, up to itself.

A token is an entry of one, which closes with itself (dtcp/sparse): so the indexer and the kernels
of compressed sparse attention read these metadata as they read theirs.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from dtcp.kernels.sparse.types import NOWHERE, SPARSE_TILE, Sight
from dtcp.metadata import AttentionMetadata, HostTensor, no_indices
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.partition import Ints
from dtcp.sequence.stretches import with_room
from dtcp.softmax.metadata import KeyExchangeMetadata


@dataclass(frozen=True, eq=False)
class TokensInSight(AttentionMetadata):
    """What queries may read among the tokens that are held here, in their order."""

    first: Tensor  # [B, L] int32, first and last token that each query may read
    last: Tensor  # [B, L] int32; -1 for padding
    token_index: Tensor  # [B, K] int32; NOWHERE behind the tokens that are held
    run: Tensor  # [B, L, 2] int32, the run of tokens that a query may read
    readers: Tensor  # [B, K, 2] int32, the run of queries that may read a token
    tiles: HostTensor  # [B, tiles, 6] int64, as of Sight
    # Of raw keys, of which there are none:
    key_token_index: Tensor  # [0] int32
    key_run: Tensor  # [B, L, 2] int32
    key_readers: Tensor  # [B, 0, 2] int32

    @property
    def sight(self) -> Sight:
        """The same, as kernels take it, with no window of raw keys."""
        return Sight(
            window_first=self.first,
            first=self.first,
            last=self.last,
            key_token_index=self.key_token_index,
            closing=self.token_index,
            key_run=self.key_run,
            key_readers=self.key_readers,
            entry_run=self.run,
            entry_readers=self.readers,
            tiles=self.tiles,
        )

    @classmethod
    def of_whole_rows(cls, intervals: KeyIntervals) -> Self:
        """Of rows on one device."""
        first, last = intervals.whole()
        every = np.arange(first.shape[1])
        return cls.in_sight(first, last, every, every, len(every))

    @classmethod
    def in_sight(
        cls, first: Tensor, last: Tensor, token: Ints, held: Ints, room: int, **more: Any
    ) -> Self:
        """Of queries that may read tokens from a first one up to a last one.

        Args:
            first, last: [B, L]; last < first for padding.
            token: [L], of the queries, ascending.
            held: the tokens that are held, ascending; in it lies all that a query may read.
            room: places for tokens.
            more: fields of a subclass.
        """
        index = with_room(held, room, NOWHERE)
        runs, readers, tiles = [], [], []
        for of_row in zip(first.numpy(), last.numpy(), strict=True):
            start, stop = (x.astype(np.int64) for x in of_row)
            real = stop >= start
            # Padding reads nothing, and what comes after it stays in ascending order.
            start = np.where(real, start, token + 1)
            low, high = held.searchsorted(start), held.searchsorted(stop, side="right")
            low, high = np.where(real, low, 0), np.where(real, high, 0)
            runs.append(np.stack((low, high), axis=-1))
            begin, end = token.searchsorted(held), start.searchsorted(held, side="right")
            of_tokens = np.where((begin < end)[:, None], np.stack((begin, end), -1), 0)
            readers.append(with_room(of_tokens, room, 0))
            tiles.append(tiles_of_runs(low, high))
        return cls(
            first=first.int(),
            last=last.masked_fill(last < first, -1).int(),
            token_index=torch.from_numpy(index).int().expand(len(runs), -1).contiguous(),
            run=torch.from_numpy(np.stack(runs)).int(),
            readers=torch.from_numpy(np.stack(readers)).int(),
            tiles=torch.from_numpy(np.stack(tiles)),
            key_token_index=no_indices(),
            key_run=torch.zeros(*first.shape, 2, dtype=torch.int32),
            key_readers=torch.zeros(len(runs), 0, 2, dtype=torch.int32),
            **more,
        )


@dataclass(frozen=True, eq=False)
class ExchangedTokens(TokensInSight):
    """The same where tokens are brought from other ranks."""

    exchange: KeyExchangeMetadata

    @classmethod
    def of(
        cls, exchange: KeyExchangeMetadata, layout: SequenceLayout, rank: int, *, in_line: bool
    ) -> Self:
        """Of the tokens of one rank, in a layout of rows or of the line of all rows."""
        (count,), token = exchange.key_counts, layout.partition.tokens(rank).astype(np.int64)
        if (np.diff(token) <= 0).any():
            raise ValueError(
                f"Queries stand in the order of their tokens, got layout={layout}: use one of "
                f"this library's."
            )
        held = exchange.key_token_index[0, :count].numpy().astype(np.int64)
        room = exchange.key_token_index.shape[1]
        seen = (exchange.first_key, exchange.last_key)
        return cls.in_sight(*seen, token, held, room, exchange=exchange, in_line=in_line)


def tiles_of_runs(low: Ints, high: Ints) -> Ints:
    """Tiles of neighbouring queries, no raw keys, and the tokens that any of them may read."""
    start = np.arange(0, len(low), SPARSE_TILE)
    sees, none = low < high, np.zeros_like(start)
    least = np.minimum.reduceat(np.where(sees, low, NOWHERE), start)
    most = np.maximum.reduceat(np.where(sees, high, 0), start)
    stop = np.minimum(start + SPARSE_TILE, len(low))
    return np.stack((start, stop, none, none, np.where(least < most, least, 0), most), axis=1)
