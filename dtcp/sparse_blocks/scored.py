"""Attention to the tokens of blocks that are picked by scores of their tokens: MiniMax-M3's.

Each head of keys and values has an index query of its own, and picks the blocks of the highest
max_t q . key_t, over their tokens t up to the query. The query's own block, complete or not, is
one of them, and the last few may be picked whatever their scores. Of each block that is picked, the
tokens up to the query are read.

From MiniMax 2026, MiniMax-M3, as of transformers 5.24 (models/minimax_m3_vl).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dtcp.kernels.sparse.block_indexer import BlockSight
from dtcp.sequence.arguments import check_ints
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sparse_blocks.mixer import SUBJECT, ScoreIndex, SparseBlockAttention
from dtcp.sparse_blocks.op import select_blocks
from dtcp.sparse_latent.blocks import BlocksInSight
from dtcp.sparse_latent.metadata import TokensInSight


class ScoredBlockAttention(SparseBlockAttention):
    """Attend to the tokens of picked blocks, which each head of keys and values picks by itself.

    Called as SparseBlockAttention is, with a ScoreIndex. Of equal scores the earlier block wins.

    Args:
        num_blocks: blocks that a query picks, at most.
        block_len: tokens in a block.
        num_local: how many of the last blocks up to the query's own are always picked.
        scale: factor on the scores of attention; None for D ** -0.5.
    """

    index_takes: ClassVar[str] = "index.q [B, L, G, W] and index.key [B, L, W]"

    def __init__(
        self, num_blocks: int, block_len: int, num_local: int, *, scale: float | None = None
    ) -> None:
        check_ints(SUBJECT, least=0, num_local=num_local)
        if num_local > num_blocks:
            raise ValueError(
                f"{SUBJECT} picks the last blocks first, got num_local={num_local} of num_blocks="
                f"{num_blocks}: pick as many at least."
            )
        super().__init__(num_blocks, block_len, scale=scale)
        self.num_local = num_local

    def set_metadata_key(self) -> None:
        self.metadata_key = self.key_of(ScoredBlockAttention, *self.reads())

    def blocks_of(self, tokens: TokensInSight, intervals: KeyIntervals) -> BlocksInSight:
        return BlocksInSight.of(tokens, intervals, self.block_len, complete=False)

    @staticmethod
    def fits(index: Any, kv_heads: int) -> bool:
        return SparseBlockAttention.fits(index, kv_heads) and index.q.shape[2] == kv_heads

    @torch.no_grad()
    def select(self, index: ScoreIndex, metadata: BlocksInSight) -> Tensor:  # type: ignore[override]
        """Which tokens each query reads, [B, L, G, num_blocks * block_len] int32.

        They are places among the tokens in sight of this rank's queries, ascending, then -1.
        """
        tokens = metadata.tokens
        keys = self.bring(index.key[:, :, None], tokens, index.key.dtype)[:, :, 0]
        seen = (tokens.first, tokens.last, tokens.token_index, tokens.tiles)
        sight = BlockSight(*seen, metadata.start, metadata.closing, metadata.tiles)
        number = min(self.num_blocks, metadata.start.shape[1])
        picked = select_blocks(index.q, keys, list(sight), self.block_len, number, self.num_local)
        return self.tokens_of(picked, metadata)

    def tokens_of(self, picked: Tensor, metadata: BlocksInSight) -> Tensor:
        """The tokens of picked blocks [B, L, G, k] up to each query, ascending, then -1."""
        of_row = picked.clamp(min=0).flatten(1).long()
        start = metadata.start.gather(1, of_row).view_as(picked)[..., None]
        slot = torch.arange(self.block_len, dtype=torch.int32, device=picked.device)
        place, stop = start + slot, metadata.tokens.run[:, :, None, None, 1:]
        return torch.where((picked[..., None] >= 0) & (place < stop), place, -1).flatten(3)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_local={self.num_local}"
