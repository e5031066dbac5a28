"""Attention in Triton, forward: a tile of queries of one head walks over its range of keys.

From Dao 2023, FlashAttention-2, section 3.1, https://arxiv.org/abs/2307.08691. Here the mask is a
range of keys per query, and the results of earlier calls are merged at the end (softmax/merge.py).
"""

import triton
import triton.language as tl

from dtcp.kernels.softmax.triton.bias import add_bias, token_index_of
from dtcp.kernels.softmax.triton.tiles import (
    TokenTile,
    channel_pointers,
    cut_into_blocks,
    inside,
    load_tile,
    partial_block,
    range_ends,
    scores_of,
    token_pointers,
)
from dtcp.kernels.triton_constants import LN_2


@triton.jit
def forward_kernel(
    q, k, v, out, lse, ranges, length, group_size, score_params, bias, shape: tl.constexpr
):
    """Grid: (tiles, H, B). Merges into out [B, L, H, V] and lse [B, L, H]."""
    # Under a causal mask the last tiles have the most work: they start first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * shape.queries
    tile = TokenTile(tl.program_id(2), tl.program_id(1), first, tl.arange(0, shape.queries))
    group = tile.head // group_size
    from_key = range_ends(ranges.begin, tile, length)
    to_key = range_ends(ranges.stop, tile, length)
    begin, stop = tl.min(from_key), tl.max(to_key)
    if begin >= stop:
        return
    full, full_begin, partial = cut_into_blocks(
        begin, tl.max(from_key), tl.min(to_key), stop, shape.keys
    )
    queries = load_tile(q, tile, length, shape.key_dim, shape.key_block, True)
    total = tl.zeros((shape.queries,), tl.float32)
    peak = total - float("inf")
    sums = tl.zeros((shape.queries, shape.value_block), tl.float32)
    rows = tl.arange(0, shape.keys)
    if shape.biased:
        of_queries = token_index_of(bias.query_index, tile, length, False)
    for index in range(partial):
        start = partial_block(index, begin, full_begin, full, shape.keys)
        keys = TokenTile(tile.batch, group, start, rows)
        products, values = _products(queries, k, v, keys, stop, shape, True)
        scores, _ = scores_of(products, score_params, shape.capped)
        if shape.biased:
            of_keys = token_index_of(bias.key_index, keys, stop, True)
            scores = add_bias(scores, bias, tile, length, of_queries, of_keys, 1)
        key = (start + rows)[None, :]
        seen = (key >= from_key[:, None]) & (key < to_key[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # Where nothing was seen yet, -inf - -inf would be NaN.
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        sums, total = _add_block(sums, total, peak, anchor, scores, values)
        peak = higher
    for index in range(full):
        keys = TokenTile(tile.batch, group, full_begin + index * shape.keys, rows)
        products, values = _products(queries, k, v, keys, stop, shape, False)
        scores, _ = scores_of(products, score_params, shape.capped)
        if shape.biased:
            of_keys = token_index_of(bias.key_index, keys, stop, True)
            scores = add_bias(scores, bias, tile, length, of_queries, of_keys, 1)
        higher = tl.maximum(peak, tl.max(scores, 1))
        anchor = higher
        if shape.biased:
            # A table may hide keys from a head.
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
        sums, total = _add_block(sums, total, peak, anchor, scores, values)
        peak = higher
    _merge(out, lse, sums, peak, total, tile, length, shape)


@triton.jit
def _products(queries, k, v, tile, stop, shape: tl.constexpr, CUT: tl.constexpr):
    """queries @ keys.T, and the values of these keys."""
    keys = load_tile(k, tile, stop, shape.key_dim, shape.key_block, CUT)
    values = load_tile(v, tile, stop, shape.value_dim, shape.value_block, CUT)
    return tl.dot(queries, tl.trans(keys), input_precision="ieee"), values


@triton.jit
def _add_block(sums, total, peak, anchor, scores, values):
    """Weighted sums of values, and sums of weights, both relative to the new anchor."""
    weights = tl.exp2(scores - anchor[:, None])
    rescale = tl.exp2(peak - anchor)
    sums = tl.dot(weights.to(values.dtype), values, sums * rescale[:, None], input_precision="ieee")
    return sums, total * rescale + tl.sum(weights, 1)


@triton.jit
def _merge(out, lse, sums, peak, total, tile, length, shape: tl.constexpr):
    """Merge into out and lse, with the weights of merge_into, which add up to 1."""
    real = tile.first + tile.rows < length
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    part_lse = tl.where(seen, (peak + tl.log2(total)) * LN_2, float("-inf"))
    lse_pointers = token_pointers(lse, tile)
    old_lse = tl.load(lse_pointers, mask=real, other=0.0)
    weight = tl.where(seen, tl.sigmoid(tl.where(seen, part_lse - old_lse, 0.0)), 0.0)
    high = tl.maximum(part_lse, old_lse)
    some = high > float("-inf")
    gap = tl.where(some, tl.minimum(part_lse, old_lse) - high, 0.0)
    tl.store(lse_pointers, high + tl.where(some, tl.log(1.0 + tl.exp(gap)), 0.0), mask=real)

    mask = inside(tile, length, shape.value_dim, shape.value_block)
    out_pointers = channel_pointers(out, tile, shape.value_block)
    old_out = tl.load(out_pointers, mask=mask, other=0.0)
    part_out = sums / total[:, None]
    tl.store(out_pointers, old_out + weight[:, None] * (part_out - old_out), mask=mask)
