"""An indexer that picks pools of tokens, where LightningIndexer picks tokens: GLM-5-Next's.

A pool is `pool_len` tokens of one document, counted from its start. Its key is a weighted sum of
its tokens' keys, channel by channel, whose weights are a softmax over the pool. Of the complete
pools of its document up to itself a query picks the best, and reads their tokens and those behind
the last complete pool, itself included.

From Z.ai 2026, GLM-5.3-Flash, as of transformers 5.24 (models/glm5_next).
"""

from typing import Any

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.metadata import BatchMetadata
from dtcp.sequence.arguments import FLOATS, check_ints, check_tensor
from dtcp.sequence.coords import Coords
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.masks import Causal
from dtcp.sparse.op import select_entries
from dtcp.sparse_latent.blocks import BlocksInSight, rows_of_blocks, tokens_of_blocks
from dtcp.sparse_latent.metadata import TokensInSight
from dtcp.sparse_latent.mixer import TokenReader, check_index_operands


class PooledIndexer(TokenReader):
    """Pick the pools whose tokens each query reads: of the highest sum_h weight_h relu(q_h . key).

    Of equal scores the earlier pool wins, so the choice depends on neither tiles nor ranks. It has
    no gradient.

    Args:
        num_pools: pools that a query picks, at most.
        pool_len: tokens in a pool.
    """

    def __init__(self, num_pools: int, pool_len: int) -> None:
        super().__init__()
        check_ints("An indexer of pools", least=1, num_pools=num_pools, pool_len=pool_len)
        self.num_pools, self.pool_len = num_pools, pool_len
        self.set_metadata_key()

    def set_metadata_key(self) -> None:
        self.metadata_key = self.key_of(PooledIndexer, self.pool_len)

    def whole_row_metadata(self, coords: Coords) -> BlocksInSight:  # type: ignore[override]
        intervals = KeyIntervals.of(Causal(), coords)
        return self.pools_of(TokensInSight.of_whole_rows(intervals), intervals)

    def pools_of(self, tokens: TokensInSight, intervals: KeyIntervals) -> BlocksInSight:
        """The pools that it picks from, of tokens that are held."""
        return BlocksInSight.of(tokens, intervals, self.pool_len, complete=True)

    def forward(
        self,
        q: Tensor,
        weight: Tensor,
        key: Tensor,
        gate: Tensor,
        bias: Tensor,
        attn_metadata: BatchMetadata,
    ) -> Tensor:
        """Select.

        Args:
            q: [B, L, H, D], sizes of the indexer's own.
            weight: [B, L, H].
            key: [B, L, D], one for all heads.
            gate: [B, L, D], of which weights in a pool are made: softmax(gate + bias).
            bias: [pool_len, D], by the place in a pool.
            attn_metadata: what the batch brings.
        Returns:
            [B, L, (k + 1) * pool_len - 1] int32, places among the tokens in sight of this rank's
            queries, ascending, then -1: what SparseLatentAttention reads of the same batch.
        """
        self.check_operands(q, weight, key, gate, bias)
        return self.select(q, weight, key, gate, bias, self.own(attn_metadata))

    @torch.no_grad()
    def select(
        self,
        q: Tensor,
        weight: Tensor,
        key: Tensor,
        gate: Tensor,
        bias: Tensor,
        metadata: BlocksInSight,
    ) -> Tensor:
        """`forward`, once the batch's metadata are known."""
        keys, tokens = self.pool_keys(key, gate, bias, metadata).to(q.dtype), metadata.tokens
        number = min(self.num_pools, keys.shape[1])
        visible = (tokens.first, tokens.last, metadata.closing, metadata.tiles)
        picked = select_entries(q, weight, keys, *visible, number)
        return tokens_of_blocks(picked, metadata, self.pool_len)

    def pool_keys(self, key: Tensor, gate: Tensor, bias: Tensor, metadata: BlocksInSight) -> Tensor:
        """Keys of all pools in sight, [B, P, D], in their order."""
        rows = torch.cat((key, gate), dim=-1)[:, :, None]
        rows = self.bring(rows, metadata.tokens, rows.dtype)[:, :, 0]
        keys, gates = rows_of_blocks(rows, metadata.start, self.pool_len).chunk(2, dim=-1)
        wide = accumulation(rows.dtype)
        weights = (gates.to(wide) + bias.to(wide)).softmax(2).to(keys.dtype)
        return (weights * keys).sum(2)

    def check_operands(
        self, q: Tensor, weight: Tensor, key: Tensor, gate: Tensor, bias: Tensor
    ) -> None:
        """Refuse what pooling and scoring would broadcast."""
        check_index_operands(q, weight, key)
        check_tensor("An indexer of pools", ndim=3, dtypes=FLOATS, gate=gate)
        check_tensor("An indexer of pools", ndim=2, dtypes=FLOATS, bias=bias)
        if gate.shape != key.shape or bias.shape != (self.pool_len, key.shape[2]):
            raise ValueError(
                f"An indexer of pools weighs each channel of a key, got key.shape="
                f"{tuple(key.shape)}, gate.shape={tuple(gate.shape)}, bias.shape="
                f"{tuple(bias.shape)}: give gate [B, L, D] and bias [{self.pool_len}, D]."
            )

    def forward_without_mixing(self, *args: Any, **kwargs: Any) -> Tensor:
        q: Tensor = args[0]
        return q.new_zeros(*q.shape[:2], 1, dtype=torch.int32)

    def extra_repr(self) -> str:
        return f"num_pools={self.num_pools}, pool_len={self.pool_len}"
