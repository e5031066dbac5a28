"""Compressed sparse attention on a sharded sequence."""

from dtcp.sparse.moves import SparseShape
from dtcp.sparse.style import CompressedSparseCP

__all__ = ["CompressedSparseCP", "SparseShape"]
