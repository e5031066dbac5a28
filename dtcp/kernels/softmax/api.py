"""Attention of local queries over keys that are on this rank: what every strategy computes with.

Two backends give the same result: Triton's kernels on a GPU, plain torch where those do not run.
"""

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.softmax.merge import sink_gradient
from dtcp.kernels.softmax.reference import ReferenceAttention
from dtcp.kernels.softmax.types import (
    AttentionKernel,
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
)
from dtcp.kernels.triton_support import ATTENTION_SHARED_MEMORY, tile_width, triton_runs_on

__all__ = [
    "AttentionKernel",
    "GradAccumulators",
    "Keys",
    "OnlineSoftmax",
    "Queries",
    "SavedForward",
    "SoftmaxParams",
    "attend",
    "attend_backward",
    "attention_kernel",
    "local_sink_gradient",
    "zeros_for",
]

WIDEST_HEAD = 512
"""Head dim up to which a tile of queries and one of keys fit into a GPU's shared memory."""


def attention_kernel(queries: Queries, keys: Keys) -> AttentionKernel:
    """Triton's kernels where they run and take these dtypes and widths, else plain torch."""
    tensors = (queries.q, keys.k, keys.v)
    same_dtype = all(x.dtype == queries.q.dtype for x in tensors)
    widest = max(x.shape[-1] for x in tensors)
    width = tile_width(queries.q, widest, shared=ATTENTION_SHARED_MEMORY)
    if not same_dtype or width > WIDEST_HEAD or not triton_runs_on(queries.q):
        return ReferenceAttention()
    # Imports Triton, which not every machine has.
    from dtcp.kernels.softmax.triton.attention import TritonAttention

    return TritonAttention()


def attend(
    state: OnlineSoftmax,
    queries: Queries,
    keys: Keys,
    block_ranges: Tensor,
    params: SoftmaxParams,
) -> None:
    """Merge the attention of `queries` over `keys` into `state`.

    Args:
        block_ranges: [B, tiles, 6], what `block_ranges` gave for these queries and keys.
    """
    attention_kernel(queries, keys).attend(state, queries, keys, block_ranges, params)


def attend_backward(
    grads: GradAccumulators,
    saved: SavedForward,
    queries: Queries,
    keys: Keys,
    block_ranges: Tensor,
    params: SoftmaxParams,
) -> None:
    """Add the gradients of `attend` over these keys to `grads`; dk and dv are of `keys`."""
    kernel = attention_kernel(queries, keys)
    kernel.attend_backward(grads, saved, queries, keys, block_ranges, params)


def zeros_for(x: Tensor) -> Tensor:
    """Zeros to sum gradients of x into, in the dtype of `accumulation`."""
    return torch.zeros(x.shape, dtype=accumulation(x.dtype), device=x.device)


def local_sink_gradient(saved: SavedForward, sink: Tensor | None) -> Tensor | None:
    """Gradient of the sinks over this rank's queries, [H]; None without sinks."""
    return None if sink is None else sink_gradient(*saved, sink)
