"""Attention to the tokens of blocks that an indexer picks, on a sharded sequence."""

from dtcp.sparse_blocks.mixer import BlockIndex, ScoreIndex, SparseBlockAttention
from dtcp.sparse_blocks.scored import ScoredBlockAttention
from dtcp.sparse_blocks.style import SparseBlockCP, SparseBlockShape

__all__ = [
    "BlockIndex",
    "ScoreIndex",
    "ScoredBlockAttention",
    "SparseBlockAttention",
    "SparseBlockCP",
    "SparseBlockShape",
]
