"""Which blocks of tokens each query may pick, worked out on the host.

A block is `block_len` tokens of one document, counted from its start, and closes with the last one
(dtcp/sparse): what a query may pick are those that close between the start of its document and
itself. So all tokens of such a block are in sight, and lie next to each other among these. Where
blocks are picked that are not complete, the one of the query among them, each closes with its first
token instead, and those of its tokens up to the query are in sight.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dtcp.kernels.sparse.types import NOWHERE
from dtcp.metadata import AttentionMetadata, HostTensor
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.stretches import with_room
from dtcp.sparse_latent.metadata import TokensInSight, tiles_of_runs


@dataclass(frozen=True, eq=False)
class BlocksInSight(AttentionMetadata):
    """What queries may read, and the blocks of it that they pick from, in their order."""

    tokens: TokensInSight
    start: Tensor  # [B, P] int32, the place of a block's first token among those that are held
    closing: Tensor  # [B, P] int32, token index that it closes with; NOWHERE behind the blocks
    tiles: HostTensor  # [B, tiles, 6] int64, as of Sight, with blocks for entries

    @classmethod
    def of(
        cls, tokens: TokensInSight, intervals: KeyIntervals, block_len: int, *, complete: bool
    ) -> Self:
        """The blocks of tokens that are held, or of those the complete ones.

        Args:
            intervals: of the whole rows, or of their line.
        """
        index = tokens.token_index[0].numpy().astype(np.int64)
        held, width = index[index < NOWHERE], block_len if complete else 1
        room = max(1, len(index) // width)
        firsts, lasts, tiles = [], [], []
        rows = (*intervals.at(held), tokens.first, tokens.last)
        for first, last, begin, end in zip(*(x.numpy() for x in rows), strict=True):
            ends = (held - first + 1 - width) % block_len == 0
            place = np.flatnonzero((last >= first) & ends)
            # Of what another row alone has in sight, a part may be held.
            place = place[place >= width - 1]
            start = place - (width - 1)
            whole = held[start] == held[place] - (width - 1)
            start, closing = start[whole], held[place[whole]]
            firsts.append(with_room(start, room, 0))
            lasts.append(with_room(closing, room, NOWHERE))
            low = np.where(end >= 0, closing.searchsorted(begin), 0)
            high = np.where(end >= 0, closing.searchsorted(end, side="right"), 0)
            tiles.append(tiles_of_runs(low, high))
        return cls(
            tokens,
            torch.from_numpy(np.stack(firsts)).int(),
            torch.from_numpy(np.stack(lasts)).int(),
            torch.from_numpy(np.stack(tiles)),
            in_line=tokens.in_line,
        )


def rows_of_blocks(rows: Tensor, start: Tensor, block_len: int) -> Tensor:
    """The rows of each block's tokens, [B, P, block_len, W] of [B, K, W]."""
    place = start.long()[..., None] + torch.arange(block_len, device=start.device)
    # Where there is room for a block that rows are too short for.
    place = place.clamp(max=rows.shape[1] - 1)
    of_blocks = rows.take_along_dim(place.flatten(1)[..., None], dim=1)
    return of_blocks.unflatten(1, place.shape[1:])


def tokens_of_blocks(picked: Tensor, metadata: BlocksInSight, block_len: int) -> Tensor:
    """The tokens of complete blocks [B, L, k], ascending then -1, and those behind the last one.

    Behind the last that a query may pick, up to itself: [B, L, (k + 1) * block_len - 1] int32.
    """
    of_row = picked.clamp(min=0).flatten(1).long()
    start = metadata.start.gather(1, of_row).view_as(picked)
    room = (picked.shape[-1] + 1) * block_len - 1
    slot = torch.arange(room, dtype=torch.int32, device=picked.device)
    place = (start[..., None] + slot[:block_len]).flatten(2)
    low, high = metadata.tokens.run.split(1, dim=-1)
    behind = (high - low) % block_len
    slot = slot - (picked >= 0).sum(-1, keepdim=True, dtype=torch.int32) * block_len
    last = torch.where(slot < behind, high - behind + slot, -1)
    return torch.where(slot < 0, F.pad(place, (0, block_len - 1)), last)
