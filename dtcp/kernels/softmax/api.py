"""Attention of local queries to lined-up keys: what every strategy computes with.

Two ways to carry it out, one result: Triton's kernels on a GPU (interval.py), and plain torch
where they do not run (tiles.py).
"""

from typing import Protocol

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.softmax import reference as tiles
from dtcp.kernels.softmax.merge import sink_gradient
from dtcp.kernels.softmax.types import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
)
from dtcp.kernels.triton_support import TILES_TAKE, tile_width, usable

WIDEST_HEAD = 512
"""Head dim up to which a tile of queries and one of keys fit into a GPU's shared memory."""


class AttentionKernel(Protocol):
    """A pair of functions as in tiles.py."""

    def attend(
        self,
        partial: OnlineSoftmax,
        queries: Queries,
        keys: Keys,
        spans: Tensor,
        how: SoftmaxParams,
    ) -> None: ...

    def attend_backward(
        self,
        grads: GradAccumulators,
        final: SavedForward,
        queries: Queries,
        keys: Keys,
        spans: Tensor,
        how: SoftmaxParams,
    ) -> None: ...


def attention_kernel(queries: Queries, keys: Keys) -> AttentionKernel:
    """Triton's kernels on GPUs that they run on, in dtypes and widths that they take."""
    heads = (queries.q, keys.k, keys.v)
    alike = all(x.dtype == queries.q.dtype for x in heads)
    widest = tile_width(queries.q, max(x.shape[-1] for x in heads), shared=TILES_TAKE)
    if not alike or widest > WIDEST_HEAD or not usable(queries.q):
        return tiles
    # Holds kernels, so it imports Triton, which not every machine has.
    from dtcp.kernels.softmax.triton import attention as interval

    return interval


def attend(
    partial: OnlineSoftmax, queries: Queries, keys: Keys, spans: Tensor, how: SoftmaxParams
) -> None:
    """Add the attention of `queries` to `keys` to `partial`.

    Args:
        spans: [B, tiles, 6], from block_ranges for these queries and keys.
    """
    attention_kernel(queries, keys).attend(partial, queries, keys, spans, how)


def attend_backward(
    grads: GradAccumulators,
    final: SavedForward,
    queries: Queries,
    keys: Keys,
    spans: Tensor,
    how: SoftmaxParams,
) -> None:
    """Add the gradients of `attend` over these keys to `grads` (dk, dv: those of `keys`)."""
    kernel = attention_kernel(queries, keys)
    kernel.attend_backward(grads, final, queries, keys, spans, how)


def zeros_for(x: Tensor) -> Tensor:
    """Room to sum gradients of x in."""
    return torch.zeros(x.shape, dtype=accumulation(x.dtype), device=x.device)


def local_sink_gradient(final: SavedForward, sink: Tensor | None) -> Tensor | None:
    return None if sink is None else sink_gradient(*final, sink)
