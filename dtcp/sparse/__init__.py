"""Compressed sparse attention on a sharded sequence."""

from dtcp.sparse.style import CompressedSparseCP, SparseShape

__all__ = ["CompressedSparseCP", "SparseShape"]
