"""An indexer's scores in Triton: a block of keys is held, and queries pass by it one after another.

Of each query all heads' products with the block are made at once, cut off below 0, weighted and
summed, so that one number of each query and key is written. This module imports Triton, so
index_kernel.py imports it only where it is used.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtcp.kernels.sparse.blocks import power_of_two
from dtcp.kernels.triton_support import StridedTensor

HALF_KEYS, FULL_KEYS = 128, 32
"""Keys that a program holds in bf16 and fp16, and in fp32: more would spill."""
QUERIES, WARPS = 16, 4
"""Queries that pass by them, and the program's warps."""


class IndexShape(NamedTuple):
    """What the kernel is compiled for; powers of two, but for the width."""

    queries: Any
    keys: Any
    heads: Any  # rows that hold them
    dim: Any
    channels: Any  # columns that hold dim
    precision: Any


def index_scores(
    q: Tensor, weight: Tensor, keys: Tensor, first: Tensor, last: Tensor, closing: Tensor
) -> Tensor:
    """sum_h weight_h * relu(q_h . key), -inf where a query does not see a key: [Q, P] fp32.

    Args:
        q: [Q, H, D].
        weight: [Q, H].
        keys: [P, D], of q's dtype.
        first, last: [Q] int32, the interval of token indices that a query sees.
        closing: [P] int32, the token index of each key.
    """
    (queries, heads, dim), number = q.shape, keys.shape[0]
    scores = torch.empty(queries, number, dtype=torch.float32, device=q.device)
    # fp32 as three products on tensor cores, which keep all of its digits but the last.
    block, precision = (FULL_KEYS, "tf32x3") if q.dtype == torch.float32 else (HALF_KEYS, "ieee")
    sizes = (QUERIES, block, power_of_two(heads), dim, power_of_two(dim), precision)
    grid = (triton.cdiv(number, block), triton.cdiv(queries, QUERIES))
    with torch.cuda.device_of(q):
        index_score_kernel[grid](
            StridedTensor.of(q),
            StridedTensor.of(weight),
            StridedTensor.of(keys),
            first.contiguous(),
            last.contiguous(),
            closing.contiguous(),
            scores,
            queries,
            heads,
            number,
            IndexShape(*(tl.constexpr(x) for x in sizes)),
            num_warps=WARPS,
        )
    return scores


# Queries and keys are parts of a batch's, cut anywhere: each cut would be compiled anew.
@triton.jit(
    do_not_specialize=["queries", "number"],
    do_not_specialize_on_alignment=["first", "last", "closing"],
)
def index_score_kernel(
    q, weight, keys, first, last, closing, scores, queries, heads, number, shape: tl.constexpr
):
    """Grid: (blocks of keys, blocks of queries). Writes scores [Q, P]."""
    place = tl.program_id(0) * shape.keys + tl.arange(0, shape.keys)
    start, real = tl.program_id(1) * shape.queries, place < number
    # In any layout offsets may pass 2**31, those of heads and of channels, too.
    h, c = tl.arange(0, shape.heads).to(tl.int64), tl.arange(0, shape.channels).to(tl.int64)
    closes = tl.load(closing + place, mask=real, other=0)
    rows = (
        keys.pointer + place.to(tl.int64)[:, None] * keys.strides[0] + c[None, :] * keys.strides[1]
    )
    k = tl.load(rows, mask=real[:, None] & (c < shape.dim)[None, :], other=0.0)
    for query in range(start, tl.minimum(start + shape.queries, queries)):
        begin, end = tl.load(first + query), tl.load(last + query)
        seen = real & (closes >= begin) & (closes <= end)
        score = tl.full([shape.keys], float("-inf"), tl.float32)
        if tl.max(seen.to(tl.int32), 0) > 0:
            at = tl.cast(query, tl.int64)
            heads_q = q.pointer + at * q.strides[0] + h[:, None] * q.strides[1]
            mask = (h < heads)[:, None] & (c < shape.dim)[None, :]
            heads_q = tl.load(heads_q + c[None, :] * q.strides[2], mask=mask, other=0.0)
            factor = weight.pointer + at * weight.strides[0] + h * weight.strides[1]
            factor = tl.load(factor, mask=h < heads, other=0.0).to(tl.float32)
            products = tl.dot(heads_q, tl.trans(k), input_precision=shape.precision)
            # NaN stays NaN, as in plain torch.
            above = tl.maximum(products, 0.0, propagate_nan=tl.PropagateNan.ALL)
            sums = tl.sum(above * factor[:, None], 0)
            score = tl.where(seen, sums, score)
        tl.store(scores + tl.cast(query, tl.int64) * number + place, score, mask=real)
