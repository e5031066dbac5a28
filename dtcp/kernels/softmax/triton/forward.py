"""Interval attention in Triton, forward: a tile of queries of one head meets its run of keys.

From Dao 2023, FlashAttention-2, section 3.1, https://arxiv.org/abs/2307.08691; here the mask is
a run of keys a query, and what earlier calls found is merged on the way out (merge.py).
"""

import triton
import triton.language as tl

from dtcp.kernels.softmax.triton.tiles import (
    LN_2,
    Place,
    block_run,
    load_rows,
    masked_block,
    pointers,
    row_pointers,
    run_ends,
    scores_of,
    within,
)


@triton.jit
def attend_tile(q, k, v, out, lse, runs, length, group_size, how, shape: tl.constexpr):
    """Grid: (tiles, H, B). Merges into out [B, L, H, V] and lse [B, L, H]."""
    # Under a causal mask the last tiles have most to do: they start first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * shape.queries
    place = Place(tl.program_id(2), tl.program_id(1), first, tl.arange(0, shape.queries))
    group = place.head // group_size
    from_key = run_ends(runs.begin, place, length)
    to_key = run_ends(runs.stop, place, length)
    begin, stop = tl.min(from_key), tl.max(to_key)
    if begin >= stop:
        return
    full, full_begin, others = block_run(begin, tl.max(from_key), tl.min(to_key), stop, shape.keys)
    queries = load_rows(q, place, length, shape.key_dim, shape.key_block, True)
    total = tl.zeros((shape.queries,), tl.float32)
    peak = total - float("inf")
    sums = tl.zeros((shape.queries, shape.value_block), tl.float32)
    rows = tl.arange(0, shape.keys)
    for index in range(others):
        start = masked_block(index, begin, full_begin, full, shape.keys)
        keys = Place(place.batch, group, start, rows)
        products, values = _products(queries, k, v, keys, stop, shape, True)
        scores, _ = scores_of(products, how, shape.capped)
        key = (start + rows)[None, :]
        seen = (key >= from_key[:, None]) & (key < to_key[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # Where nothing was seen yet, -inf - -inf would be no number.
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        sums, total = _add(sums, total, peak, anchor, scores, values)
        peak = higher
    for index in range(full):
        keys = Place(place.batch, group, full_begin + index * shape.keys, rows)
        products, values = _products(queries, k, v, keys, stop, shape, False)
        scores, _ = scores_of(products, how, shape.capped)
        higher = tl.maximum(peak, tl.max(scores, 1))
        sums, total = _add(sums, total, peak, higher, scores, values)
        peak = higher
    _merge(out, lse, sums, peak, total, place, length, shape)


@triton.jit
def _products(queries, k, v, place, stop, shape: tl.constexpr, CUT: tl.constexpr):
    """queries x keys, and the values of these keys."""
    keys = load_rows(k, place, stop, shape.key_dim, shape.key_block, CUT)
    values = load_rows(v, place, stop, shape.value_dim, shape.value_block, CUT)
    return tl.dot(queries, tl.trans(keys), input_precision="ieee"), values


@triton.jit
def _add(sums, total, peak, anchor, scores, values):
    """Weighted sums of values, and sums of weights, all in terms of the new anchor."""
    weights = tl.exp2(scores - anchor[:, None])
    kept = tl.exp2(peak - anchor)
    sums = tl.dot(weights.to(values.dtype), values, sums * kept[:, None], input_precision="ieee")
    return sums, total * kept + tl.sum(weights, 1)


@triton.jit
def _merge(out, lse, sums, peak, total, place, length, shape: tl.constexpr):
    """Add to what is known, with the weights of merge_into, which add up to 1."""
    real = place.first + place.rows < length
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    found = tl.where(seen, (peak + tl.log2(total)) * LN_2, float("-inf"))
    at = row_pointers(lse, place)
    known = tl.load(at, mask=real, other=0.0)
    weight = tl.where(seen, tl.sigmoid(tl.where(seen, found - known, 0.0)), 0.0)
    high = tl.maximum(found, known)
    some = high > float("-inf")
    apart = tl.where(some, tl.minimum(found, known) - high, 0.0)
    tl.store(at, high + tl.where(some, tl.log(1.0 + tl.exp(apart)), 0.0), mask=real)

    inside = within(place, length, shape.value_dim, shape.value_block)
    at = pointers(out, place, shape.value_block)
    before = tl.load(at, mask=inside, other=0.0)
    part = sums / total[:, None]
    tl.store(at, before + weight[:, None] * (part - before), mask=inside)
