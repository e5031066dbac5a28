"""Compressed sparse attention on a sharded sequence."""

from dtcp.sparse.published import PublishedSparseCP
from dtcp.sparse.style import CompressedSparseCP, SparseShape

__all__ = ["CompressedSparseCP", "PublishedSparseCP", "SparseShape"]
