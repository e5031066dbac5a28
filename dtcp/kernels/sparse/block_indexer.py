"""An indexer of blocks of tokens: which ones each query picks, by the best score of their tokens.

In plain torch on every device: what takes time are products of matrices.
"""

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.sparse.index_kernel import visible
from dtcp.kernels.sparse.indexer import (
    MAX_INDEX_SCORES,
    NO_ENTRY,
    compact,
    highest,
    places_from,
    steps,
)


class BlockSight(NamedTuple):
    """Which tokens, and blocks of them, each query sees; on the device, except both `tiles`.

    A block is seen from its first token on, and read up to the query.
    """

    first: Tensor  # [B, L] int32, first and last token that each query may read
    last: Tensor  # [B, L] int32; -1 for padding
    token_index: Tensor  # [B, K] int32, of the tokens in sight, ascending
    tiles: Tensor  # [B, tiles, 6] int64 on the host, as of Sight, with tokens for entries
    start: Tensor  # [B, P] int32, the place of a block's first token among the tokens
    start_token: Tensor  # [B, P] int32, its token index; NOWHERE behind the blocks
    block_tiles: Tensor  # [B, tiles, 6] int64 on the host, the same with blocks for entries


class _Given(NamedTuple):
    """Some queries of one row, and all tokens and blocks that any of them may see."""

    q: Tensor  # [Q, H, D]
    keys: Tensor  # [K, D]
    first: Tensor  # [Q]
    last: Tensor  # [Q]
    token_index: Tensor  # [K]
    start: Tensor  # [P], places among these tokens
    start_token: Tensor  # [P]


def top_blocks(
    q: Tensor, keys: Tensor, sight: BlockSight, block_len: int, num_blocks: int, num_local: int
) -> Tensor:
    """Select the blocks of the highest max_t q_h . key_t, over their tokens t up to the query.

    Each head selects by itself. The last `num_local` blocks that a query sees are always among
    them; of equal scores the earlier block wins.

    Args:
        q: [B, L, H, D].
        keys: [B, K, D].
        num_blocks: for each query and head, at most; no fewer than num_local.
    Returns:
        [B, L, H, num_blocks] int32, ascending places among the blocks, then NO_ENTRY.
    """
    out = q.new_full((*q.shape[:3], num_blocks), NO_ENTRY, dtype=torch.int32)
    tiles = torch.cat((sight.tiles, sight.block_tiles[..., 4:]), dim=-1)
    for row, of_row in enumerate(tiles.tolist()):
        for begin, end, _, _, low, high, low_block, high_block in of_row:
            tokens, blocks = slice(low, high), slice(low_block, high_block)
            width = max(1, high - low, (high_block - low_block) * block_len)
            step = max(1, MAX_INDEX_SCORES // (q.shape[2] * width))
            for queries in (slice(*each) for each in steps(begin, end, step)):
                given = _Given(
                    q[row, queries],
                    keys[row, tokens],
                    sight.first[row, queries],
                    sight.last[row, queries],
                    sight.token_index[row, tokens],
                    sight.start[row, blocks] - low,
                    sight.start_token[row, blocks],
                )
                picked = _select(given, block_len, num_blocks, num_local)
                out[row, queries, :, : picked.shape[-1]] = picked + low_block * (picked >= 0)
    return out


def _select(given: _Given, block_len: int, num_blocks: int, num_local: int) -> Tensor:
    """[Q, H, k], places among the given blocks."""
    seen = visible(given.first, given.last, given.start_token)[:, None]  # [Q, 1, P]
    number = seen.shape[-1]
    if number <= num_blocks:
        keep = seen.expand(-1, given.q.shape[1], -1)
    else:
        # Blocks that a query sees are one run, and the last one is its own.
        ahead = (given.start_token > given.last[:, None]).sum(-1)[:, None, None]
        place = torch.arange(number, device=seen.device)
        local = seen & (place >= number - ahead - num_local)
        score = _block_scores(given, block_len).masked_fill_(local, inf)
        score = score.masked_fill_(~seen, -inf).flatten(0, 1)
        keep = highest(score, num_blocks) & (score > -inf)
        keep = keep.unflatten(0, given.q.shape[:2])
    flat = keep.flatten(0, 1)
    picked = compact(places_from(flat, 0), flat, min(number, num_blocks), fill=NO_ENTRY)
    return picked.unflatten(0, keep.shape[:2])


def _block_scores(given: _Given, block_len: int) -> Tensor:
    """The best score of the tokens of each block that a query sees, [Q, H, P]."""
    q, keys, first, last, token_index, start, _ = given
    wide = accumulation(q.dtype)
    score = (q.flatten(0, 1).to(wide) @ keys.to(wide).mT).unflatten(0, q.shape[:2])
    score = score.masked_fill_(~visible(first, last, token_index)[:, None], -inf)
    # What stands behind the end of a document's last block is hidden from all that see the block.
    token = start[:, None] + torch.arange(block_len, device=start.device)
    token = token.clamp(max=len(keys) - 1)
    return score[..., token.flatten()].unflatten(-1, token.shape).amax(-1)
