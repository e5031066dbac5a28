"""Sparse attention in Triton, backward: queries walk over their keys, keys over their readers.

Weights are made again from the lse. From Dao 2023, FlashAttention-2, section 3.1.2,
https://arxiv.org/abs/2307.08691; a key is a value too, so its gradient has two parts.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dtcp.kernels.sparse.triton.forward import (
    LOG2E,
    load,
    load_rows,
    own_place,
    rows_of,
    run_of,
    store,
    walk,
)


class Final(NamedTuple):
    """What gradients are made of, beside keys."""

    q: Any  # a View
    grad_out: Any  # a View
    lse: Any  # [B, L, H]
    delta: Any  # [B, L, H], the sum of grad_out * out over channels


@triton.jit
def query_gradients(final, out, given, dq, sizes, scale, shape: tl.constexpr):
    """Grid: (blocks of rows, B). Writes dq [B, L, H, D], and delta for the other kernels."""
    rows = rows_of(tl.program_id(0), tl.program_id(1).to(tl.int64), sizes, shape)
    start, at = own_place(rows, sizes)
    found = load(out + start * shape.dim, at * shape.dim, rows.there, shape).to(tl.float32)
    delta = tl.sum(load_rows(final.grad_out, rows, shape).to(tl.float32) * found, 1)
    tl.store(final.delta + start + at, delta, mask=rows.there)
    lse = _finite(tl.load(final.lse + start + at, mask=rows.there, other=0.0))
    mine = (_load_in_turns(final, rows, shape), lse, delta, scale * LOG2E)
    sums = tl.zeros([shape.rows, shape.channels], tl.float32)
    sums = walk(_fold_queries, mine, sums, rows, given, sizes, shape)
    store(dq + start * shape.dim, at * shape.dim, sums * scale, rows.there, shape)


@triton.jit
def _fold_queries(mine, k, seen, sums, shape: tl.constexpr):
    """What one more block of keys adds to dq / scale."""
    both, lse, delta, scale = mine
    products = tl.dot(both, tl.trans(k), input_precision=shape.precision)
    products = tl.permute(tl.reshape(products, (shape.rows, 2, shape.keys)), (0, 2, 1))
    scores, from_out = tl.split(products)
    weights = tl.exp2(tl.where(seen, scores * scale, float("-inf")) - lse[:, None])
    of_scores = weights * (from_out - delta[:, None])
    return tl.dot(of_scores.to(k.dtype), k, acc=sums, input_precision=shape.precision)


@triton.jit
def run_gradients(final, keys, readers, found, sizes, scale, shape: tl.constexpr):
    """Grid: (blocks of keys, splits of their readers, B). Writes found [splits, B, K, D], fp32.

    Args:
        keys: [B, K, D], of a number that `sizes.keys` gives.
        readers: [B, K, 2], the run of queries that read each.
    """
    split, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, n = tl.program_id(0) * shape.keys, tl.arange(0, shape.keys)
    there, key = n < sizes.keys - first, row * sizes.keys + first
    k = load(keys + key * shape.dim, n * shape.dim, there, shape)
    start, stop, low, high = run_of(readers + key * 2, n, there)
    queries, parts = shape.rows // shape.heads, tl.cdiv(sizes.heads, shape.heads)
    begin = low // queries
    blocks = tl.cdiv(high, queries) - begin
    since = begin + blocks * split // tl.num_programs(1)
    until = begin + blocks * (split + 1) // tl.num_programs(1)
    sums = tl.zeros([shape.keys, shape.channels], tl.float32)
    for block in range(since * parts, until * parts):
        rows = rows_of(block, row, sizes, shape)
        reader = tl.where(rows.there, rows.query.to(tl.int32) + rows.offset_query, -1)
        seen = (reader[None, :] >= start[:, None]) & (reader[None, :] < stop[:, None])
        sums = _fold_readers(final, k, rows, seen, sums, sizes, scale, shape)
    place = split * tl.num_programs(2) * tl.cast(sizes.keys, tl.int64) + key
    store(found + place * shape.dim, n * shape.dim, sums, there, shape)


@triton.jit
def pick_gradients(final, given, dentries, sizes, scale, shape: tl.constexpr):
    """Grid: (L, blocks of picks, B). Adds to dentries [B, P, D], fp32, in no fixed order.

    A block of rows is of one query.
    """
    query, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    token, first = row * sizes.queries + query, tl.program_id(1) * shape.keys
    in_sight = tl.load(given.entry_run + token * 2 + 1) - tl.load(given.entry_run + token * 2)
    number = tl.minimum(sizes.picks, in_sight)
    if first < number:
        n, c = tl.arange(0, shape.keys), tl.arange(0, shape.channels)
        chosen = given.selected + token * sizes.picks + first
        place = tl.load(chosen + n, mask=n < number - first, other=-1).to(tl.int64)
        start = row * sizes.entries * shape.dim
        k = load(given.entries + start, place * shape.dim, place >= 0, shape)
        parts = tl.cdiv(sizes.heads, shape.heads)
        sums = tl.zeros([shape.keys, shape.channels], tl.float32)
        for block in range(query * parts, (query + 1) * parts):
            rows = rows_of(block, row, sizes, shape)
            seen = (place >= 0)[:, None] & rows.there[None, :]
            sums = _fold_readers(final, k, rows, seen, sums, sizes, scale, shape)
        mask = (place >= 0)[:, None] & (c < shape.dim)[None, :]
        at = place[:, None] * shape.dim + c[None, :]
        tl.atomic_add(dentries + start + at, sums, mask=mask, sem="relaxed")


@triton.jit
def _fold_readers(final, k, rows, seen, sums, sizes, scale, shape: tl.constexpr):
    """What one more block of rows adds to the gradient of keys: once as keys, once as values.

    Rows of q and of grad_out take turns in one matrix, for two products rather than four. That
    costs no exchange: two columns next to each other are one thread's.
    """
    start, at = own_place(rows, sizes)
    lse = _finite(tl.load(final.lse + start + at, mask=rows.there, other=0.0))
    delta = tl.load(final.delta + start + at, mask=rows.there, other=0.0)
    both = _load_in_turns(final, rows, shape)
    products = tl.dot(k, tl.trans(both), input_precision=shape.precision)
    scores, from_out = tl.split(tl.reshape(products, (shape.keys, shape.rows, 2)))
    scores = tl.where(seen, scores * (scale * LOG2E), float("-inf"))
    weights = tl.exp2(scores - lse[None, :])
    of_scores = weights * (from_out - delta[None, :]) * scale
    taken = tl.reshape(tl.join(of_scores, weights), (shape.keys, 2 * shape.rows))
    return tl.dot(taken.to(k.dtype), both, acc=sums, input_precision=shape.precision)


@triton.jit
def _load_in_turns(final, rows, shape: tl.constexpr):
    """Row 2 i is row i of q, row 2 i + 1 that of grad_out: [2 rows, channels]."""
    m = tl.arange(0, 2 * shape.rows)
    of_query, of_head, is_grad = m // 2 // shape.heads, m // 2 % shape.heads, m % 2 == 1
    there = tl.reshape(tl.join(rows.there, rows.there), (2 * shape.rows,))
    a, b = final.q, final.grad_out
    q = a.at + rows.row * a.strides[0] + rows.query * a.strides[1] + rows.head * a.strides[2]
    grad = b.at + rows.row * b.strides[0] + rows.query * b.strides[1] + rows.head * b.strides[2]
    q += of_query * a.strides[1] + of_head * a.strides[2]
    grad += of_query * b.strides[1] + of_head * b.strides[2]
    c = tl.arange(0, shape.channels)
    at = tl.where(is_grad, grad, q)[:, None] + c[None, :]
    return tl.load(at, mask=there[:, None] & (c < shape.dim)[None, :], other=0.0)


@triton.jit
def _finite(lse):
    """In units of log 2; a row that sees nothing has weights 0 with any base."""
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2E)
