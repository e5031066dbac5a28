"""Interval attention in Triton, backward, given out and lse over all keys.

Two kernels, so that every sum has one owner and no order of arrival changes a bit: a tile of
queries sums dq over its keys, a block of keys sums dk and dv over its queries.
From Dao 2023, FlashAttention-2, section 3.1.2, https://arxiv.org/abs/2307.08691
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dtcp.kernels.softmax.triton.tiles import (
    LOG2_E,
    NOWHERE,
    Place,
    add_rows,
    block_run,
    load_rows,
    masked_block,
    row_pointers,
    run_ends,
    scores_of,
)


class Queries(NamedTuple):
    """What a block of keys reads of the queries it meets, in a kernel."""

    q: Any
    grad_out: Any
    lse: Any
    delta: Any
    runs: Any
    length: Any


@triton.jit
def query_gradients(
    q, k, v, grad_out, out, lse, delta, dq, runs, length, group_size, how, shape: tl.constexpr
):
    """Grid: (tiles, H, B). Adds to dq; leaves rowsum(grad_out * out) in delta [B, L, H]."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * shape.queries
    place = Place(tl.program_id(2), tl.program_id(1), first, tl.arange(0, shape.queries))
    group = place.head // group_size
    grads = load_rows(grad_out, place, length, shape.value_dim, shape.value_block, True)
    outs = load_rows(out, place, length, shape.value_dim, shape.value_block, True)
    row = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    # Of every tile, even one that sees nothing: key_gradients may come past it.
    tl.store(row_pointers(delta, place), row, mask=first + place.rows < length)

    from_key = run_ends(runs.begin, place, length)
    to_key = run_ends(runs.stop, place, length)
    begin, stop = tl.min(from_key), tl.max(to_key)
    if begin >= stop:
        return
    full, full_begin, others = block_run(begin, tl.max(from_key), tl.min(to_key), stop, shape.keys)
    queries = load_rows(q, place, length, shape.key_dim, shape.key_block, True)
    grads = grads.to(queries.dtype)
    level = _level(lse, place, length)
    sums = tl.zeros((shape.queries, shape.key_block), tl.float32)
    rows = tl.arange(0, shape.keys)
    for index in range(others):
        start = masked_block(index, begin, full_begin, full, shape.keys)
        at = Place(place.batch, group, start, rows)
        keys = load_rows(k, at, stop, shape.key_dim, shape.key_block, True)
        values = load_rows(v, at, stop, shape.value_dim, shape.value_block, True)
        scores, ratio = _scores(queries, keys, how, shape)
        key = (start + rows)[None, :]
        seen = (key >= from_key[:, None]) & (key < to_key[:, None])
        weights = tl.exp2(tl.where(seen, scores, float("-inf")) - level[:, None])
        found = _score_gradients(weights, grads, values, row[:, None], ratio, shape)
        sums = tl.dot(found.to(keys.dtype), keys, sums, input_precision="ieee")
    for index in range(full):
        at = Place(place.batch, group, full_begin + index * shape.keys, rows)
        keys = load_rows(k, at, stop, shape.key_dim, shape.key_block, False)
        values = load_rows(v, at, stop, shape.value_dim, shape.value_block, False)
        scores, ratio = _scores(queries, keys, how, shape)
        weights = tl.exp2(scores - level[:, None])
        found = _score_gradients(weights, grads, values, row[:, None], ratio, shape)
        sums = tl.dot(found.to(keys.dtype), keys, sums, input_precision="ieee")
    add_rows(dq, sums * how.scale, place, length, shape.key_dim, shape.key_block)


@triton.jit(do_not_specialize=["num_keys"])
def key_gradients(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    dk,
    dv,
    runs,
    reach,
    length,
    num_keys,
    group_size,
    how,
    shape: tl.constexpr,
):
    """Grid: (blocks of keys, G, B). Adds to dk and dv, over the heads that share the keys."""
    block, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = reach.at + batch * reach.strides[0] + block * 4
    begin, stop = tl.load(tiles) * shape.queries, tl.load(tiles + 3) * shape.queries
    if begin >= stop:
        return
    full_begin, full_stop = tl.load(tiles + 1) * shape.queries, tl.load(tiles + 2) * shape.queries
    full, full_begin, others = block_run(begin, full_begin, full_stop, stop, shape.queries)
    place = Place(batch, group, block * shape.keys, tl.arange(0, shape.keys))
    keys = load_rows(k, place, num_keys, shape.key_dim, shape.key_block, True)
    values = load_rows(v, place, num_keys, shape.value_dim, shape.value_block, True)
    key_sums = tl.zeros((shape.keys, shape.key_block), tl.float32)
    value_sums = tl.zeros((shape.keys, shape.value_block), tl.float32)
    sources = Queries(q, grad_out, lse, delta, runs, length)
    rows = tl.arange(0, shape.queries)
    for shared in range(group_size):
        head = group * group_size + shared
        for index in range(others):
            start = masked_block(index, begin, full_begin, full, shape.queries)
            at = Place(batch, head, start, rows)
            key_sums, value_sums = _meet_queries(
                key_sums, value_sums, keys, values, place, sources, at, how, shape, True
            )
        for index in range(full):
            at = Place(batch, head, full_begin + index * shape.queries, rows)
            key_sums, value_sums = _meet_queries(
                key_sums, value_sums, keys, values, place, sources, at, how, shape, False
            )
    add_rows(dk, key_sums * how.scale, place, num_keys, shape.key_dim, shape.key_block)
    add_rows(dv, value_sums, place, num_keys, shape.value_dim, shape.value_block)


@triton.jit
def _meet_queries(
    key_sums, value_sums, keys, values, place, x, at, how, shape: tl.constexpr, MASKED: tl.constexpr
):
    """Both sums, with what the tile of queries `at` adds; scores are [keys, queries] here."""
    queries = load_rows(x.q, at, x.length, shape.key_dim, shape.key_block, MASKED)
    scores, ratio = _scores(keys, queries, how, shape)
    real = at.first + at.rows < x.length
    if MASKED:
        from_key = tl.where(real, run_ends(x.runs.begin, at, x.length), NOWHERE)
        to_key = run_ends(x.runs.stop, at, x.length)
        key = (place.first + place.rows)[:, None]
        seen = (key >= from_key[None, :]) & (key < to_key[None, :])
        scores = tl.where(seen, scores, float("-inf"))
    weights = tl.exp2(scores - _level(x.lse, at, x.length)[None, :])
    grads = load_rows(x.grad_out, at, x.length, shape.value_dim, shape.value_block, MASKED)
    grads = grads.to(values.dtype)
    row = tl.load(row_pointers(x.delta, at), mask=real, other=0.0)
    found = _score_gradients(weights, values, grads, row[None, :], ratio, shape)
    value_sums = tl.dot(weights.to(grads.dtype), grads, value_sums, input_precision="ieee")
    key_sums = tl.dot(found.to(queries.dtype), queries, key_sums, input_precision="ieee")
    return key_sums, value_sums


@triton.jit
def _scores(left, right, how, shape: tl.constexpr):
    """Of queries x keys, or keys x queries."""
    return scores_of(tl.dot(left, tl.trans(right), input_precision="ieee"), how, shape.capped)


@triton.jit
def _score_gradients(weights, left, right, row, ratio, shape: tl.constexpr):
    """From gradients x values, or values x gradients; without the scale."""
    weight_gradients = tl.dot(left, tl.trans(right), input_precision="ieee")
    found = weights * (weight_gradients - row)
    if shape.capped:
        found = found * (1.0 - ratio * ratio)
    return found


@triton.jit
def _level(lse, place, length):
    """lse in units of log 2; inf (weight 0) of queries that see nothing or are none."""
    inside = place.first + place.rows < length
    found = tl.load(row_pointers(lse, place), mask=inside, other=float("inf")).to(tl.float32)
    return tl.where(found == float("-inf"), float("inf"), found * LOG2_E)
