"""Sparse attention in Triton, backward: queries walk over their keys, keys over their readers.

Weights are recomputed from the lse. A key's first channels are its value too, and their gradient
has two parts.

From Dao 2023, FlashAttention-2, section 3.1.2, https://arxiv.org/abs/2307.08691
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dtcp.kernels.sparse.triton.forward import (
    add_products,
    load_channels,
    load_runs,
    load_values,
    multiply,
    no_sums,
    result_offsets,
    row_block,
    row_offsets,
    store_channels,
    walk,
)
from dtcp.kernels.triton_constants import LOG2_E


class SavedOperands(NamedTuple):
    """What gradients are computed from, beside the keys."""

    q: Any  # a StridedTensor
    grad_out: Any  # a StridedTensor
    lse: Any  # [B, L, H]
    delta: Any  # [B, L, H], the sum of grad_out * out over channels


@triton.jit
def sparse_query_gradient_kernel(saved, out, operands, dq, sizes, scale, shape: tl.constexpr):
    """Grid: (blocks of rows, B). Writes dq [B, L, H, D], and delta for the other kernels."""
    rows = row_block(tl.program_id(0), tl.program_id(1).to(tl.int64), sizes, shape)
    start, offsets = result_offsets(rows, sizes)
    width = shape.value_dim
    outs = load_values(out + start * width, offsets * width, rows.real, shape)
    grad_start, grad_offsets = row_offsets(saved.grad_out, rows)
    grads = load_values(saved.grad_out.pointer + grad_start, grad_offsets, rows.real, shape)
    delta = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    tl.store(saved.delta + start + offsets, delta, mask=rows.real)
    lse = _lse_in_log2(tl.load(saved.lse + start + offsets, mask=rows.real, other=0.0))
    inputs = (_load_interleaved(saved, rows, shape), lse, delta, scale * LOG2_E)
    sums = walk(_add_keys, inputs, no_sums(shape.rows, shape), rows, operands, sizes, shape)
    sums = (sums[0] * scale, sums[1] * scale)
    store_channels(dq + start * shape.dim, offsets * shape.dim, sums, rows.real, shape)


@triton.jit
def _add_keys(inputs, k, seen, sums, shape: tl.constexpr):
    """dq / scale, with the share of one more block of keys."""
    both, lse, delta, scale = inputs
    products = multiply(both, k, shape)
    products = tl.permute(tl.reshape(products, (shape.rows, 2, shape.keys)), (0, 2, 1))
    scores, d_weights = tl.split(products)
    weights = tl.exp2(tl.where(seen, scores * scale, float("-inf")) - lse[:, None])
    return add_products(sums, weights * (d_weights - delta[:, None]), k, shape)


@triton.jit
def sparse_key_gradient_kernel(saved, keys, readers, dkeys, sizes, scale, shape: tl.constexpr):
    """Grid: (blocks of keys, splits of their readers, B). Writes dkeys [splits, B, K, D], fp32.

    Args:
        keys: [B, K, D]; K is `sizes.keys`.
        readers: [B, K, 2], the run of queries that read each key.
    """
    split, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, n = tl.program_id(0) * shape.keys, tl.arange(0, shape.keys)
    real, key = n < sizes.keys - first, batch * sizes.keys + first
    k = load_channels(keys + key * shape.dim, n * shape.dim, real, shape)
    start, stop, low, high = load_runs(readers + key * 2, n, real)
    queries, parts = shape.rows // shape.heads, tl.cdiv(sizes.heads, shape.heads)
    begin = low // queries
    blocks = tl.cdiv(high, queries) - begin
    since = begin + blocks * split // tl.num_programs(1)
    until = begin + blocks * (split + 1) // tl.num_programs(1)
    sums = no_sums(shape.keys, shape)
    for block in range(since * parts, until * parts):
        rows = row_block(block, batch, sizes, shape)
        reader = tl.where(rows.real, rows.query.to(tl.int32) + rows.query_offset, -1)
        seen = (reader[None, :] >= start[:, None]) & (reader[None, :] < stop[:, None])
        sums = _add_readers(saved, k, rows, seen, sums, sizes, scale, shape)
    place = split * tl.num_programs(2) * tl.cast(sizes.keys, tl.int64) + key
    store_channels(dkeys + place * shape.dim, n * shape.dim, sums, real, shape)


@triton.jit
def selected_gradient_kernel(saved, operands, dentries, sizes, scale, shape: tl.constexpr):
    """Grid: (L, blocks of selected entries, B). Adds to dentries [B, P, D], fp32, in any order.

    A block of rows is of one query.
    """
    query, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    token, first = batch * sizes.queries + query, tl.program_id(1) * shape.keys
    run = operands.entry_run + token * 2
    number = tl.minimum(sizes.selected, tl.load(run + 1) - tl.load(run))
    if first < number:
        n = tl.arange(0, shape.keys)
        selected = operands.selected + token * sizes.selected + first
        place = tl.load(selected + n, mask=n < number - first, other=-1).to(tl.int64)
        start = batch * sizes.entries * shape.dim
        k = load_channels(operands.entries + start, place * shape.dim, place >= 0, shape)
        parts = tl.cdiv(sizes.heads, shape.heads)
        sums = no_sums(shape.keys, shape)
        for block in range(query * parts, (query + 1) * parts):
            rows = row_block(block, batch, sizes, shape)
            seen = (place >= 0)[:, None] & rows.real[None, :]
            sums = _add_readers(saved, k, rows, seen, sums, sizes, scale, shape)
        _add_channels(dentries + start, place * shape.dim, sums, place >= 0, shape)


@triton.jit
def _add_channels(x, offsets, parts, mask, shape: tl.constexpr):
    """Add to all channels at x + offsets, but where masked, whoever else does."""
    values, others = parts
    c = tl.arange(0, shape.channels)
    where = mask[:, None] & (c < shape.value_dim)[None, :]
    tl.atomic_add(x + offsets[:, None] + c[None, :], values, mask=where, sem="relaxed")
    if shape.others > 0:
        c = shape.value_dim + tl.arange(0, shape.others)
        where = mask[:, None] & (c < shape.dim)[None, :]
        tl.atomic_add(x + offsets[:, None] + c[None, :], others, mask=where, sem="relaxed")


@triton.jit
def _add_readers(saved, k, rows, seen, sums, sizes, scale, shape: tl.constexpr):
    """Gradients of keys, as keys and as values, with the share of one more block of rows.

    Rows of q and of grad_out alternate in one matrix, which makes two products of four. To split
    its products takes no exchange between threads: one thread holds each pair of columns.
    """
    start, offsets = result_offsets(rows, sizes)
    lse = _lse_in_log2(tl.load(saved.lse + start + offsets, mask=rows.real, other=0.0))
    delta = tl.load(saved.delta + start + offsets, mask=rows.real, other=0.0)
    both = _load_interleaved(saved, rows, shape)
    products = multiply(k, both, shape)
    scores, d_weights = tl.split(tl.reshape(products, (shape.keys, shape.rows, 2)))
    scores = tl.where(seen, scores * (scale * LOG2_E), float("-inf"))
    weights = tl.exp2(scores - lse[None, :])
    d_scores = weights * (d_weights - delta[None, :]) * scale
    factors = tl.reshape(tl.join(d_scores, weights), (shape.keys, 2 * shape.rows))
    return add_products(sums, factors, both, shape)


@triton.jit
def _load_interleaved(saved, rows, shape: tl.constexpr):
    """Row 2 i is row i of q, row 2 i + 1 is row i of grad_out, 0 in the channels that it has not.

    In two parts: [2 rows, channels] and, if there are other channels, [2 rows, others].
    """
    m = tl.arange(0, 2 * shape.rows)
    query_offset, head_offset = m // 2 // shape.heads, m // 2 % shape.heads
    real = tl.reshape(tl.join(rows.real, rows.real), (2 * shape.rows,))
    q = _row_pointers(saved.q, rows, query_offset, head_offset)
    grad = _row_pointers(saved.grad_out, rows, query_offset, head_offset)
    c = tl.arange(0, shape.channels)
    pointers = tl.where(m % 2 == 1, grad, q)[:, None] + c[None, :]
    mask = real[:, None] & (c < shape.value_dim)[None, :]
    values = tl.load(pointers, mask=mask, other=0.0)
    if shape.others == 0:
        return values, tl.cast(0.0, values.dtype)
    else:
        c = shape.value_dim + tl.arange(0, shape.others)
        mask = (real & (m % 2 == 0))[:, None] & (c < shape.dim)[None, :]
        return values, tl.load(q[:, None] + c[None, :], mask=mask, other=0.0)


@triton.jit
def _row_pointers(x, rows, query_offset, head_offset):
    start = rows.batch * x.strides[0] + rows.query * x.strides[1] + rows.head * x.strides[2]
    return x.pointer + start + (query_offset * x.strides[1] + head_offset * x.strides[2])


@triton.jit
def _lse_in_log2(lse):
    """0 for a row that sees nothing: its weights are 0 whatever is subtracted from its scores."""
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2_E)
