"""What attention to picked blocks becomes once a style has taken it over."""

from typing import Any

from torch import Tensor

from dtcp.sequence.row_layouts import on_line
from dtcp.sparse_blocks.mixer import SparseBlockAttention
from dtcp.sparse_blocks.scored import ScoredBlockAttention
from dtcp.sparse_latent.blocks import BlocksInSight
from dtcp.sparse_latent.claimed import BringsTokens


class ContextParallelSparseBlocks(BringsTokens, SparseBlockAttention):
    """A SparseBlockAttention that a style has taken over."""

    carry_out = SparseBlockAttention.forward

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, index: Any, metadata: BlocksInSight
    ) -> Tensor:
        if not metadata.in_line:
            return super().attend(q, k, v, index, metadata)
        line = type(index)(*(on_line(x) if isinstance(x, Tensor) else x for x in index))
        out = super().attend(on_line(q), on_line(k), on_line(v), line, metadata)
        return out.view(*q.shape[:3], -1)


class ContextParallelScoredBlocks(ContextParallelSparseBlocks, ScoredBlockAttention):
    """A ScoredBlockAttention that a style has taken over."""
