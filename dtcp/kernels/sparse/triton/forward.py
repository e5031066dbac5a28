"""Sparse attention in Triton, forward, and what all kernels share: how a block of rows reads keys.

A block of rows is some heads of one query, or of a few queries where heads are few. All rows
read the one head of keys, which is what makes products of matrices out of it. A run of keys is
read as it lies; picked entries are gathered while they are read.

Scores are in units of log 2. Where a block starts is one int64 number, what lies in it is
numbered in int32: that saves registers.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
NOWHERE = tl.constexpr(2147483647)


class View(NamedTuple):
    """A tensor [B, L, H, D] with its channels next to each other, and no head far from another."""

    at: Any  # a tensor on the host, a pointer in a kernel
    strides: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> "View":
        near = x.stride(2) * x.shape[2] < 2**31
        x = x if x.stride(-1) == 1 and near else x.contiguous()
        return cls(x, x.stride()[:3])


class Given(NamedTuple):
    """What a query may read; contiguous."""

    keys: Any  # [B, K, D]
    entries: Any  # [B, P, D]
    selected: Any  # [B, L, k]
    key_run: Any  # [B, L, 2]
    entry_run: Any  # [B, L, 2]
    closing: Any  # [B, P]


class Sizes(NamedTuple):
    """Numbers of a launch."""

    queries: Any
    heads: Any
    keys: Any
    entries: Any
    picks: Any


class Shape(NamedTuple):
    """What a kernel is compiled for; all but `dim` are powers of two."""

    heads: Any  # of a query, in a block of rows
    rows: Any
    keys: Any
    dim: Any
    channels: Any  # that hold dim
    has_sink: Any
    has_entries: Any
    has_picks: Any
    precision: Any


class Rows(NamedTuple):
    """A block of rows, in a kernel."""

    row: Any  # of the batch
    query: Any
    head: Any
    offset_query: Any
    offset_head: Any
    there: Any


@triton.jit
def rows_of(block, row, sizes, shape: tl.constexpr):
    """The blocks of a query's heads are neighbours."""
    parts = tl.cdiv(sizes.heads, shape.heads)
    query = (block // parts) * (shape.rows // shape.heads)
    head = (block % parts) * shape.heads
    m = tl.arange(0, shape.rows)
    of_query, of_head = m // shape.heads, m % shape.heads
    there = (query + of_query < sizes.queries) & (head + of_head < sizes.heads)
    return Rows(row, tl.cast(query, tl.int64), head, of_query, of_head, there)


@triton.jit
def load(x, at, there, shape: tl.constexpr):
    """Channels that start at x + at: [len(at), channels], zeros where there is nothing."""
    c = tl.arange(0, shape.channels)
    mask = there[:, None] & (c < shape.dim)[None, :]
    return tl.load(x + at[:, None] + c[None, :], mask=mask, other=0.0)


@triton.jit
def store(x, at, values, there, shape: tl.constexpr):
    c = tl.arange(0, shape.channels)
    mask = there[:, None] & (c < shape.dim)[None, :]
    tl.store(x + at[:, None] + c[None, :], values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(x, rows, shape: tl.constexpr):
    start = rows.row * x.strides[0] + rows.query * x.strides[1] + rows.head * x.strides[2]
    at = rows.offset_query * x.strides[1] + rows.offset_head * x.strides[2]
    return load(x.at + start, at, rows.there, shape)


@triton.jit
def own_place(rows, sizes):
    """Where a block's results start among [B, L, H] rows, and each of them from there."""
    start = (rows.row * sizes.queries + rows.query) * sizes.heads + rows.head
    return start, rows.offset_query * sizes.heads + rows.offset_head


@triton.jit
def run_of(runs, at, there):
    """From where and up to where each one reads, and from where and up to where any does."""
    start = tl.load(runs + at * 2, mask=there, other=0)
    stop = tl.load(runs + at * 2 + 1, mask=there, other=0)
    high = tl.max(stop, 0)
    return start, stop, tl.minimum(tl.min(tl.where(start < stop, start, NOWHERE), 0), high), high


@triton.jit
def walk(step: tl.constexpr, mine, state, rows, given, sizes, shape: tl.constexpr):
    """Take a step with each block of keys that a block of rows reads: its window, then entries."""
    token = rows.row * sizes.queries + rows.query
    run = run_of(given.key_run + token * 2, rows.offset_query, rows.there)
    keys = given.keys + rows.row * sizes.keys * shape.dim
    state = _walk_run(step, mine, state, keys, run, given.closing, False, shape)
    if shape.has_entries:
        run = run_of(given.entry_run + token * 2, rows.offset_query, rows.there)
        entries = given.entries + rows.row * sizes.entries * shape.dim
        if shape.has_picks:
            # All rows are of one query. Its picks come first, and no more than are in sight.
            number = tl.minimum(sizes.picks, run[3] - run[2])
            chosen = given.selected + token * sizes.picks
            state = _walk_picks(step, mine, state, entries, chosen, number, rows.there, shape)
        else:
            closing = given.closing + rows.row * sizes.entries
            state = _walk_run(step, mine, state, entries, run, closing, True, shape)
    return state


@triton.jit
def _walk_run(
    step: tl.constexpr, mine, state, keys, run, closing, HOLES: tl.constexpr, shape: tl.constexpr
):
    """A run as it lies; with HOLES, what closes nowhere is no entry."""
    start, stop, low, high = run
    n = tl.arange(0, shape.keys)
    for first in range(low, high, shape.keys):
        left = high - first
        at = first + n
        k = load(keys + tl.cast(first, tl.int64) * shape.dim, n * shape.dim, n < left, shape)
        if HOLES:
            closes = tl.load(closing + at, mask=n < left, other=NOWHERE)
            at = tl.where(closes < NOWHERE, at, -1)
        seen = (at[None, :] >= start[:, None]) & (at[None, :] < stop[:, None])
        state = step(mine, k, seen, state, shape)
    return state


@triton.jit
def _walk_picks(
    step: tl.constexpr, mine, state, entries, chosen, number, there, shape: tl.constexpr
):
    n = tl.arange(0, shape.keys)
    for first in range(0, number, shape.keys):
        place = tl.load(chosen + first + n, mask=n < number - first, other=-1).to(tl.int64)
        k = load(entries, place * shape.dim, place >= 0, shape)
        state = step(mine, k, (place >= 0)[None, :] & there[:, None], state, shape)
    return state


@triton.jit
def attend(q, sink, given, out, lse, sizes, scale, shape: tl.constexpr):
    """Grid: (blocks of rows, B). Writes out [B, L, H, D] and lse [B, L, H]."""
    rows = rows_of(tl.program_id(0), tl.program_id(1).to(tl.int64), sizes, shape)
    total = tl.zeros([shape.rows], tl.float32)
    most = total - float("inf")
    if shape.has_sink:
        most = tl.load(sink + rows.head + rows.offset_head, mask=rows.there, other=0.0) * LOG2E
        total += 1.0
    mine = (load_rows(q, rows, shape), scale * LOG2E)
    state = (tl.zeros([shape.rows, shape.channels], tl.float32), most, total)
    sums, most, total = walk(_fold, mine, state, rows, given, sizes, shape)
    start, at = own_place(rows, sizes)
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    store(out + start * shape.dim, at * shape.dim, sums / total[:, None], rows.there, shape)
    tl.store(lse + start + at, (most + tl.log2(total)) / LOG2E, mask=rows.there)


@triton.jit
def _fold(mine, k, seen, state, shape: tl.constexpr):
    """One more block of keys, which are values too, in a softmax that goes along."""
    q, scale = mine
    sums, most, total = state
    scores = tl.dot(q, tl.trans(k), input_precision=shape.precision) * scale
    scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(most, tl.max(scores, 1))
    # Rows that have seen nothing yet keep weight 0, where -inf - -inf would be NaN.
    base = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores - base[:, None])
    rest = tl.exp2(most - base)
    sums = sums * rest[:, None]
    sums = tl.dot(weights.to(k.dtype), k, acc=sums, input_precision=shape.precision)
    return sums, new, total * rest + tl.sum(weights, 1)
