"""Compressed sparse attention on a sharded sequence."""

from benchmarks.published_sparse import PublishedSparseCP
from dtcp.sparse.style import CompressedSparseCP, SparseShape

__all__ = ["CompressedSparseCP", "PublishedSparseCP", "SparseShape"]
