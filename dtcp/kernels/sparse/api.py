"""Attention to a window of keys and to compressed entries: what the op of the mixer calls.

Two backends give the same result: Triton's kernels on a GPU, plain torch where those do not run.
"""

import torch
from torch import Tensor

from dtcp.kernels.sparse.reference import ReferenceSparseAttention
from dtcp.kernels.sparse.types import Sight, SparseGradients, SparseKernel, SparseKeys
from dtcp.kernels.triton_support import tile_width, triton_runs_on

__all__ = [
    "Sight",
    "SparseGradients",
    "SparseKernel",
    "SparseKeys",
    "sparse_backward",
    "sparse_forward",
    "sparse_kernel",
]

WIDEST_SPARSE_HEAD = 512
"""Channels with which a block of rows fits into the registers of a GPU's processor."""
SPARSE_SHARED_MEMORY = 200 * 1024
"""Bytes that a thread block uses at that width: an A100 has less."""


def sparse_kernel(q: Tensor, keys: SparseKeys) -> SparseKernel:
    """Triton's kernels where they run and take these dtypes and widths, else plain torch.

    Triton's gradients of selected entries are summed in no fixed order. Where torch is asked for
    deterministic algorithms, plain torch computes them instead.
    """
    tensors = [x for x in (keys.keys, keys.entries) if x is not None]
    same_dtype = all(x.dtype == q.dtype for x in tensors)
    ordered = keys.selected is None or not torch.are_deterministic_algorithms_enabled()
    fits = tile_width(q, q.shape[-1], shared=SPARSE_SHARED_MEMORY) <= WIDEST_SPARSE_HEAD
    if not (same_dtype and ordered and fits and triton_runs_on(q)):
        return ReferenceSparseAttention()
    # Imports Triton, which not every machine has.
    from dtcp.kernels.sparse.triton.attention import TritonSparseAttention

    return TritonSparseAttention()


def sparse_forward(
    q: Tensor, keys: SparseKeys, sink: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend all queries: out [B, L, H, D] in q's dtype, and lse [B, L, H]."""
    return sparse_kernel(q, keys).forward(q, keys, sink, scale)


def sparse_backward(
    grad_out: Tensor,
    q: Tensor,
    keys: SparseKeys,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> SparseGradients:
    """Gradients of `sparse_forward`."""
    return sparse_kernel(q, keys).backward(grad_out, q, keys, sink, out, lse, scale)
