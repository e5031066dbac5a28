"""Attention over latents to the tokens that an indexer picks, on a sharded sequence."""

from dtcp.sparse_latent.mixer import LightningIndexer, SparseLatentAttention
from dtcp.sparse_latent.pooled import PooledIndexer
from dtcp.sparse_latent.style import SparseLatentCP, SparseLatentShape

__all__ = [
    "LightningIndexer",
    "PooledIndexer",
    "SparseLatentAttention",
    "SparseLatentCP",
    "SparseLatentShape",
]
