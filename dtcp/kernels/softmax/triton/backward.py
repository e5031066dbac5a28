"""Attention in Triton, backward, given out and lse over all keys.

Two kernels, so that each sum is computed by one program and in one order, with the same bits
every time: a tile of queries sums dq over its keys, a block of keys sums dk and dv over its
queries.

From Dao 2023, FlashAttention-2, section 3.1.2, https://arxiv.org/abs/2307.08691
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dtcp.kernels.softmax.triton.bias import (
    add_bias,
    add_bias_gradients,
    store_bias_sums,
    token_index_of,
)
from dtcp.kernels.softmax.triton.tiles import (
    NO_KEY,
    TokenTile,
    add_to_tile,
    cut_into_blocks,
    load_tile,
    partial_block,
    range_ends,
    scores_of,
    token_pointers,
)
from dtcp.kernels.triton_constants import LOG2_E


class KeyOperands(NamedTuple):
    """What a tile of queries reads of its keys, and what of these it sees, in a kernel."""

    k: Any
    v: Any
    from_key: Any
    to_key: Any
    stop: Any
    length: Any
    bias: Any
    gradients: Any  # of the bias
    of_queries: Any  # their token indices, where there is a bias


class QueryOperands(NamedTuple):
    """What a block of keys reads of the queries that see it, in a kernel."""

    q: Any
    grad_out: Any
    lse: Any
    delta: Any
    ranges: Any
    length: Any
    bias: Any
    of_keys: Any  # their token indices, where there is a bias


@triton.jit
def query_gradient_kernel(
    q,
    k,
    v,
    grad_out,
    out,
    lse,
    delta,
    dq,
    ranges,
    length,
    group_size,
    score_params,
    bias,
    bias_gradients,
    shape: tl.constexpr,
):
    """Grid: (tiles, H, B). Adds to dq; writes rowsum(grad_out * out) to delta [B, L, H]."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * shape.queries
    tile = TokenTile(tl.program_id(2), tl.program_id(1), first, tl.arange(0, shape.queries))
    group = tile.head // group_size
    grads = load_tile(grad_out, tile, length, shape.value_dim, shape.value_block, True)
    outs = load_tile(out, tile, length, shape.value_dim, shape.value_block, True)
    row_delta = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    # Written for every tile, even one that sees nothing: key_gradient_kernel may visit it.
    tl.store(token_pointers(delta, tile), row_delta, mask=first + tile.rows < length)

    from_key = range_ends(ranges.begin, tile, length)
    to_key = range_ends(ranges.stop, tile, length)
    begin, stop = tl.min(from_key), tl.max(to_key)
    if begin >= stop:
        return
    full, full_begin, partial = cut_into_blocks(
        begin, tl.max(from_key), tl.min(to_key), stop, shape.keys
    )
    queries = load_tile(q, tile, length, shape.key_dim, shape.key_block, True)
    grads = grads.to(queries.dtype)
    level = _lse_in_log2(lse, tile, length)
    sums = tl.zeros((shape.queries, shape.key_block), tl.float32)
    rows = tl.arange(0, shape.keys)
    of_queries, zeros = None, tl.zeros((shape.queries,), tl.float32)
    if shape.biased:
        of_queries = token_index_of(bias.query_index, tile, length, False)
    bias_sums = (zeros, zeros, zeros)
    x = KeyOperands(k, v, from_key, to_key, stop, length, bias, bias_gradients, of_queries)
    operands = (queries, grads, row_delta, level)
    for index in range(partial):
        start = partial_block(index, begin, full_begin, full, shape.keys)
        block = TokenTile(tile.batch, group, start, rows)
        sums, bias_sums = _add_keys(
            sums, bias_sums, operands, tile, x, block, score_params, shape, True
        )
    for index in range(full):
        block = TokenTile(tile.batch, group, full_begin + index * shape.keys, rows)
        sums, bias_sums = _add_keys(
            sums, bias_sums, operands, tile, x, block, score_params, shape, False
        )
    add_to_tile(dq, sums * score_params.scale, tile, length, shape.key_dim, shape.key_block)
    if shape.biased:
        store_bias_sums(bias_gradients, bias_sums, tile, length)


@triton.jit
def _add_keys(
    sums,
    bias_sums,
    operands,
    tile,
    x,
    block,
    score_params,
    shape: tl.constexpr,
    MASKED: tl.constexpr,
):
    """All sums of a tile of queries with the share of one block of keys."""
    queries, grads, row_delta, level = operands
    keys = load_tile(x.k, block, x.stop, shape.key_dim, shape.key_block, MASKED)
    values = load_tile(x.v, block, x.stop, shape.value_dim, shape.value_block, MASKED)
    scores, tanh = _scores(queries, keys, score_params, shape)
    if shape.biased:
        of_keys = token_index_of(x.bias.key_index, block, x.stop, True)
        scores = add_bias(scores, x.bias, tile, x.length, x.of_queries, of_keys, 1)
    if MASKED:
        key = (block.first + block.rows)[None, :]
        seen = (key >= x.from_key[:, None]) & (key < x.to_key[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    weights = tl.exp2(scores - level[:, None])
    d_scores = _score_gradients(weights, grads, values, row_delta[:, None])
    if shape.biased:
        stored = (tile.first + tile.rows < x.length)[:, None]
        if MASKED:
            stored = stored & seen
        bias_sums = add_bias_gradients(
            bias_sums, d_scores, x.bias, x.gradients, tile, x.length, x.of_queries, of_keys, stored
        )
    d_scores = _product_gradients(d_scores, tanh, shape)
    return tl.dot(d_scores.to(keys.dtype), keys, sums, input_precision="ieee"), bias_sums


@triton.jit(do_not_specialize=["num_keys"])
def key_gradient_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    dk,
    dv,
    ranges,
    query_tiles,
    length,
    num_keys,
    group_size,
    score_params,
    bias,
    shape: tl.constexpr,
):
    """Grid: (blocks of keys, G, B). Adds to dk and dv, over the heads that share the keys."""
    block, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = query_tiles.pointer + batch.to(tl.int64) * query_tiles.strides[0] + block * 4
    begin, stop = tl.load(tiles) * shape.queries, tl.load(tiles + 3) * shape.queries
    if begin >= stop:
        return
    full_begin, full_stop = tl.load(tiles + 1) * shape.queries, tl.load(tiles + 2) * shape.queries
    full, full_begin, partial = cut_into_blocks(begin, full_begin, full_stop, stop, shape.queries)
    own = TokenTile(batch, group, block * shape.keys, tl.arange(0, shape.keys))
    keys = load_tile(k, own, num_keys, shape.key_dim, shape.key_block, True)
    values = load_tile(v, own, num_keys, shape.value_dim, shape.value_block, True)
    key_sums = tl.zeros((shape.keys, shape.key_block), tl.float32)
    value_sums = tl.zeros((shape.keys, shape.value_block), tl.float32)
    of_keys = None
    if shape.biased:
        of_keys = token_index_of(bias.key_index, own, num_keys, False)
    operands = QueryOperands(q, grad_out, lse, delta, ranges, length, bias, of_keys)
    rows = tl.arange(0, shape.queries)
    for shared in range(group_size):
        head = group * group_size + shared
        for index in range(partial):
            start = partial_block(index, begin, full_begin, full, shape.queries)
            tile = TokenTile(batch, head, start, rows)
            key_sums, value_sums = _add_queries(
                key_sums, value_sums, keys, values, own, operands, tile, score_params, shape, True
            )
        for index in range(full):
            tile = TokenTile(batch, head, full_begin + index * shape.queries, rows)
            key_sums, value_sums = _add_queries(
                key_sums, value_sums, keys, values, own, operands, tile, score_params, shape, False
            )
    add_to_tile(dk, key_sums * score_params.scale, own, num_keys, shape.key_dim, shape.key_block)
    add_to_tile(dv, value_sums, own, num_keys, shape.value_dim, shape.value_block)


@triton.jit
def _add_queries(
    key_sums,
    value_sums,
    keys,
    values,
    own,
    x,
    tile,
    score_params,
    shape: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Both sums with the share of one tile of queries; scores are [keys, queries] here."""
    queries = load_tile(x.q, tile, x.length, shape.key_dim, shape.key_block, MASKED)
    scores, tanh = _scores(keys, queries, score_params, shape)
    if shape.biased:
        of_queries = token_index_of(x.bias.query_index, tile, x.length, False)
        scores = add_bias(scores, x.bias, tile, x.length, of_queries, x.of_keys, 0)
    real = tile.first + tile.rows < x.length
    if MASKED:
        from_key = tl.where(real, range_ends(x.ranges.begin, tile, x.length), NO_KEY)
        to_key = range_ends(x.ranges.stop, tile, x.length)
        key = (own.first + own.rows)[:, None]
        seen = (key >= from_key[None, :]) & (key < to_key[None, :])
        scores = tl.where(seen, scores, float("-inf"))
    weights = tl.exp2(scores - _lse_in_log2(x.lse, tile, x.length)[None, :])
    grads = load_tile(x.grad_out, tile, x.length, shape.value_dim, shape.value_block, MASKED)
    grads = grads.to(values.dtype)
    row_delta = tl.load(token_pointers(x.delta, tile), mask=real, other=0.0)
    d_scores = _score_gradients(weights, values, grads, row_delta[None, :])
    d_scores = _product_gradients(d_scores, tanh, shape)
    value_sums = tl.dot(weights.to(grads.dtype), grads, value_sums, input_precision="ieee")
    key_sums = tl.dot(d_scores.to(queries.dtype), queries, key_sums, input_precision="ieee")
    return key_sums, value_sums


@triton.jit
def _scores(left, right, score_params, shape: tl.constexpr):
    """Of queries @ keys.T, or of keys @ queries.T."""
    products = tl.dot(left, tl.trans(right), input_precision="ieee")
    return scores_of(products, score_params, shape.capped)


@triton.jit
def _score_gradients(weights, left, right, delta):
    """From grad_out @ values.T, or values @ grad_out.T."""
    d_weights = tl.dot(left, tl.trans(right), input_precision="ieee")
    return weights * (d_weights - delta)


@triton.jit
def _product_gradients(d_scores, tanh, shape: tl.constexpr):
    """Gradients of scores before the cap; the scale is left out."""
    if shape.capped:
        d_scores = d_scores * (1.0 - tanh * tanh)
    return d_scores


@triton.jit
def _lse_in_log2(lse, tile, length):
    """lse in units of log 2; inf (so weight 0) for queries that see nothing or do not exist."""
    real = tile.first + tile.rows < length
    value = tl.load(token_pointers(lse, tile), mask=real, other=float("inf")).to(tl.float32)
    return tl.where(value == float("-inf"), float("inf"), value * LOG2_E)
