"""Sparse attention in Triton, forward, and how a block of rows reads keys, which backward shares.

A block of rows is some heads of one query, or of a few queries where heads are few. All rows read
the one head of keys, which makes the products matrix products. Runs of keys are read in order;
selected entries are gathered as they are read.

The first channels of a key are its value. Where there are more (a latent's rotary key), these are
a second, narrow matrix: what is summed is as wide as the value, and 576 channels are 512 + 64 and
not 1,024.

Scores are in units of log 2. Where a block starts is one int64 number, and places in it are
int32: that saves registers.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dtcp.kernels.sparse.types import NOWHERE
from dtcp.kernels.triton_constants import LOG2_E
from dtcp.kernels.triton_support import StridedTensor

_NOWHERE = tl.constexpr(NOWHERE)
MOST_ROWS = 64
"""Of any block in blocks.py, each of another query where there is one head."""


def head_rows(x: Tensor) -> StridedTensor:
    """x [B, L, H, D] for a kernel, copied unless channels are adjacent, and heads and tokens near.

    Offsets in a block of rows are int32: all heads of as many tokens must lie within 2**31 numbers.
    """
    near = x.stride(2) * x.shape[2] + x.stride(1) * MOST_ROWS < 2**31
    x = x if x.stride(-1) == 1 and near else x.contiguous()
    return StridedTensor(x, x.stride()[:3])


class SparseOperands(NamedTuple):
    """What a query may read, as a kernel takes it; all contiguous."""

    keys: Any  # [B, K, D]
    entries: Any  # [B, P, D]
    selected: Any  # [B, L, k]
    key_run: Any  # [B, L, 2]
    entry_run: Any  # [B, L, 2]
    closing: Any  # [B, P]


class SparseSizes(NamedTuple):
    """Sizes as numbers of a launch."""

    queries: Any
    heads: Any
    keys: Any
    entries: Any
    selected: Any  # entries per query; 0 where there is no selection


class BlockShape(NamedTuple):
    """What a kernel is compiled for; all sizes but the two `dim` are powers of two."""

    heads: Any  # of one query, in a block of rows
    rows: Any
    keys: Any
    dim: Any  # of a query and a key
    value_dim: Any  # of them, from the first on, those of a value
    channels: Any  # columns that hold value_dim
    others: Any  # columns that hold the rest of dim; 0 where there is none
    has_sink: Any
    has_entries: Any
    has_selection: Any
    precision: Any


class RowBlock(NamedTuple):
    """A block of rows, in a kernel: where it starts, and the offset of each row from there."""

    batch: Any
    query: Any
    head: Any
    query_offset: Any  # [rows]
    head_offset: Any  # [rows]
    real: Any  # [rows] bool, whether the query and the head exist


@triton.jit
def row_block(block, batch, sizes, shape: tl.constexpr):
    """The blocks of one query's heads are neighbours."""
    parts = tl.cdiv(sizes.heads, shape.heads)
    query = (block // parts) * (shape.rows // shape.heads)
    head = (block % parts) * shape.heads
    m = tl.arange(0, shape.rows)
    query_offset, head_offset = m // shape.heads, m % shape.heads
    real = (query + query_offset < sizes.queries) & (head + head_offset < sizes.heads)
    return RowBlock(batch, tl.cast(query, tl.int64), head, query_offset, head_offset, real)


@triton.jit
def load_values(x, offsets, mask, shape: tl.constexpr):
    """The channels of values at x + offsets: [len(offsets), channels], zeros where masked."""
    c = tl.arange(0, shape.channels)
    mask = mask[:, None] & (c < shape.value_dim)[None, :]
    return tl.load(x + offsets[:, None] + c[None, :], mask=mask, other=0.0)


@triton.jit
def load_others(x, offsets, mask, shape: tl.constexpr):
    """The channels behind those of values: [len(offsets), others]; a number if there are none."""
    if shape.others == 0:
        return tl.cast(0.0, x.dtype.element_ty)
    else:
        c = shape.value_dim + tl.arange(0, shape.others)
        mask = mask[:, None] & (c < shape.dim)[None, :]
        return tl.load(x + offsets[:, None] + c[None, :], mask=mask, other=0.0)


@triton.jit
def load_channels(x, offsets, mask, shape: tl.constexpr):
    """All channels at x + offsets, in two parts: values, and the others."""
    values = load_values(x, offsets, mask, shape)
    return values, load_others(x, offsets, mask, shape)


@triton.jit
def store_values(x, offsets, values, mask, shape: tl.constexpr):
    """Write values [len(offsets), channels] at x + offsets, but where masked."""
    c = tl.arange(0, shape.channels)
    mask = mask[:, None] & (c < shape.value_dim)[None, :]
    tl.store(x + offsets[:, None] + c[None, :], values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def store_channels(x, offsets, parts, mask, shape: tl.constexpr):
    """Write all channels at x + offsets, but where masked."""
    values, others = parts
    store_values(x, offsets, values, mask, shape)
    if shape.others > 0:
        c = shape.value_dim + tl.arange(0, shape.others)
        mask = mask[:, None] & (c < shape.dim)[None, :]
        tl.store(x + offsets[:, None] + c[None, :], others.to(x.dtype.element_ty), mask=mask)


@triton.jit
def no_sums(NUMBER: tl.constexpr, shape: tl.constexpr):
    """Zeros of all channels, fp32: [NUMBER, channels], and [NUMBER, others] if there are any."""
    values = tl.zeros([NUMBER, shape.channels], tl.float32)
    if shape.others == 0:
        return values, tl.cast(0.0, tl.float32)
    else:
        return values, tl.zeros([NUMBER, shape.others], tl.float32)


@triton.jit
def multiply(a, b, shape: tl.constexpr):
    """Products of rows with rows, over all channels: a @ b^T, both in two parts."""
    products = tl.dot(a[0], tl.trans(b[0]), input_precision=shape.precision)
    if shape.others > 0:
        products = tl.dot(a[1], tl.trans(b[1]), acc=products, input_precision=shape.precision)
    return products


@triton.jit
def add_products(sums, factors, rows, shape: tl.constexpr):
    """sums + factors @ rows, over all channels; sums and rows in two parts."""
    factors = factors.to(rows[0].dtype)
    values, others = sums
    values = tl.dot(factors, rows[0], acc=values, input_precision=shape.precision)
    if shape.others > 0:
        others = tl.dot(factors, rows[1], acc=others, input_precision=shape.precision)
    return values, others


@triton.jit
def row_offsets(x, rows):
    """Where a block of rows of x [B, L, H, D] starts, and each row's offset from it."""
    start = rows.batch * x.strides[0] + rows.query * x.strides[1] + rows.head * x.strides[2]
    return start, rows.query_offset * x.strides[1] + rows.head_offset * x.strides[2]


@triton.jit
def result_offsets(rows, sizes):
    """Where a block's results start among the rows of [B, L, H], and each row's offset from it."""
    start = (rows.batch * sizes.queries + rows.query) * sizes.heads + rows.head
    return start, rows.query_offset * sizes.heads + rows.head_offset


@triton.jit
def load_runs(runs, offsets, mask):
    """Start and stop of each run; then the least start and the largest stop of nonempty runs."""
    start = tl.load(runs + offsets * 2, mask=mask, other=0)
    stop = tl.load(runs + offsets * 2 + 1, mask=mask, other=0)
    high = tl.max(stop, 0)
    low = tl.minimum(tl.min(tl.where(start < stop, start, _NOWHERE), 0), high)
    return start, stop, low, high


@triton.jit
def walk(step: tl.constexpr, inputs, state, rows, operands, sizes, shape: tl.constexpr):
    """Fold each block of keys that a block of rows reads into `state`: its window, then entries.

    `step` maps (inputs, keys, seen, state, shape) to the next state.
    """
    token = rows.batch * sizes.queries + rows.query
    run = load_runs(operands.key_run + token * 2, rows.query_offset, rows.real)
    keys = operands.keys + rows.batch * sizes.keys * shape.dim
    state = _walk_run(step, inputs, state, keys, run, operands.closing, False, shape)
    if shape.has_entries:
        run = load_runs(operands.entry_run + token * 2, rows.query_offset, rows.real)
        entries = operands.entries + rows.batch * sizes.entries * shape.dim
        if shape.has_selection:
            # All rows are of one query. No more entries are selected than it sees.
            number = tl.minimum(sizes.selected, run[3] - run[2])
            selected = operands.selected + token * sizes.selected
            state = _walk_selected(step, inputs, state, entries, selected, number, rows.real, shape)
        else:
            closing = operands.closing + rows.batch * sizes.entries
            state = _walk_run(step, inputs, state, entries, run, closing, True, shape)
    return state


@triton.jit
def _walk_run(
    step: tl.constexpr, inputs, state, keys, run, closing, HOLES: tl.constexpr, shape: tl.constexpr
):
    """A run in order; with HOLES, places that close nowhere hold no entry."""
    start, stop, low, high = run
    n = tl.arange(0, shape.keys)
    for first in range(low, high, shape.keys):
        left = high - first
        place = first + n
        block = keys + tl.cast(first, tl.int64) * shape.dim
        k = load_channels(block, n * shape.dim, n < left, shape)
        if HOLES:
            closes = tl.load(closing + place, mask=n < left, other=_NOWHERE)
            place = tl.where(closes < _NOWHERE, place, -1)
        seen = (place[None, :] >= start[:, None]) & (place[None, :] < stop[:, None])
        state = step(inputs, k, seen, state, shape)
    return state


@triton.jit
def _walk_selected(
    step: tl.constexpr, inputs, state, entries, selected, number, real, shape: tl.constexpr
):
    """The first `number` entries of a selection, gathered."""
    n = tl.arange(0, shape.keys)
    for first in range(0, number, shape.keys):
        place = tl.load(selected + first + n, mask=n < number - first, other=-1).to(tl.int64)
        k = load_channels(entries, place * shape.dim, place >= 0, shape)
        state = step(inputs, k, (place >= 0)[None, :] & real[:, None], state, shape)
    return state


@triton.jit
def sparse_forward_kernel(q, sink, operands, out, lse, sizes, scale, shape: tl.constexpr):
    """Grid: (blocks of rows, B). Writes out [B, L, H, V] and lse [B, L, H]."""
    rows = row_block(tl.program_id(0), tl.program_id(1).to(tl.int64), sizes, shape)
    total = tl.zeros([shape.rows], tl.float32)
    peak = total - float("inf")
    if shape.has_sink:
        peak = tl.load(sink + rows.head + rows.head_offset, mask=rows.real, other=0.0) * LOG2_E
        total += 1.0
    start, offsets = row_offsets(q, rows)
    inputs = (load_channels(q.pointer + start, offsets, rows.real, shape), scale * LOG2_E)
    state = (tl.zeros([shape.rows, shape.channels], tl.float32), peak, total)
    sums, peak, total = walk(_attend_block, inputs, state, rows, operands, sizes, shape)
    start, offsets = result_offsets(rows, sizes)
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    means = sums / total[:, None]
    width = shape.value_dim
    store_values(out + start * width, offsets * width, means, rows.real, shape)
    tl.store(lse + start + offsets, (peak + tl.log2(total)) / LOG2_E, mask=rows.real)


@triton.jit
def _attend_block(inputs, k, seen, state, shape: tl.constexpr):
    """One step of the online softmax; the first channels of keys are the values too."""
    q, scale = inputs
    sums, peak, total = state
    scores = tl.where(seen, multiply(q, k, shape) * scale, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    # Rows that have seen nothing yet keep weight 0, where -inf - -inf would be NaN.
    anchor = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - anchor[:, None])
    rescale = tl.exp2(peak - anchor)
    sums = sums * rescale[:, None]
    values = k[0]
    sums = tl.dot(weights.to(values.dtype), values, acc=sums, input_precision=shape.precision)
    return sums, higher, total * rescale + tl.sum(weights, 1)
