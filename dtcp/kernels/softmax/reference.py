"""Attention of local queries over keys in plain torch, tile by tile.

Nothing of size L x K is ever made: a tile of queries takes its range of keys in pieces, and only
the partial blocks at both ends carry a mask, built on the spot from the queries' intervals.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.softmax.block import block_attention, block_attention_backward
from dtcp.kernels.softmax.merge import NOTHING_SEEN, merge_into
from dtcp.kernels.softmax.types import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
)

MAX_BLOCK_KEYS = 8192
"""Keys in one block, which may hold a score for each of them and each of its queries."""


class ReferenceAttention:
    """`AttentionKernel` in plain torch, on any device and in any dtype."""

    def attend(
        self, state: OnlineSoftmax, queries: Queries, keys: Keys, params: SoftmaxParams
    ) -> None:
        for block in _blocks(queries, keys):
            out, lse = block_attention(
                queries.q[block.queries],
                keys.k[block.keys],
                keys.v[block.keys],
                block.bias,
                scale=params.scale,
                softcap=params.softcap,
                score_bias=block.score_bias(queries, keys),
            )
            merge_into(state.out[block.queries], state.lse[block.queries], out, lse)

    def attend_backward(
        self,
        grads: GradAccumulators,
        saved: SavedForward,
        queries: Queries,
        keys: Keys,
        params: SoftmaxParams,
    ) -> None:
        for block in _blocks(queries, keys):
            dq, dk, dv = block_attention_backward(
                saved.grad_out[block.queries],
                queries.q[block.queries],
                keys.k[block.keys],
                keys.v[block.keys],
                saved.out[block.queries],
                saved.lse[block.queries],
                block.bias,
                scale=params.scale,
                softcap=params.softcap,
                score_bias=block.score_bias(queries, keys),
                take_d_scores=block.take_d_scores(queries, keys),
            )
            grads.dq[block.queries] += dq
            grads.dk[block.keys] += dk
            grads.dv[block.keys] += dv


class _Block(NamedTuple):
    """Some queries and some keys, as indices of [B, L, ...] and [B, K, ...] tensors."""

    queries: tuple[slice, slice]
    keys: tuple[slice, slice]
    bias: Tensor | None  # [B or 1, Q, K]; None where every query sees every key

    def score_bias(self, queries: Queries, keys: Keys) -> Tensor | None:
        """What is added to the block's scores by distance: [B or 1, H, Q, K]."""
        if queries.bias is None:
            return None
        return queries.bias.of_block(self.queries, keys.token_index[self.keys[1]])

    def take_d_scores(self, queries: Queries, keys: Keys) -> Callable[[Tensor], None] | None:
        """What sums up the gradients of that."""
        if queries.bias is None:
            return None
        key_index = keys.token_index[self.keys[1]]
        return partial(queries.bias.add_gradients, queries=self.queries, key_index=key_index)


def _blocks(queries: Queries, keys: Keys) -> Iterator[_Block]:
    """All blocks that some query sees; rows with the same ranges share theirs."""
    batch, ranges = queries.q.shape[0], keys.block_ranges
    assert ranges is not None
    same_rows = bool((ranges == ranges[:1]).all())
    row_groups = [slice(0, batch)] if same_rows else [slice(b, b + 1) for b in range(batch)]
    for rows in row_groups:
        for q_start, q_stop, *key_range in ranges[rows.start].tolist():
            tile = slice(q_start, q_stop)
            for start, stop, masked in _pieces(*key_range):
                for first in range(start, stop, MAX_BLOCK_KEYS):
                    block = slice(first, min(first + MAX_BLOCK_KEYS, stop))
                    token_index = keys.token_index[block]
                    bias = _bias(queries, token_index, rows, tile) if masked else None
                    yield _Block((rows, tile), (rows, block), bias)


def _pieces(start: int, full_start: int, full_stop: int, stop: int) -> list[tuple[int, int, bool]]:
    """(start, stop, whether it is partial) of the parts of a range of keys."""
    if full_start == full_stop:
        return [(start, stop, True)]
    return [(start, full_start, True), (full_start, full_stop, False), (full_stop, stop, True)]


def _bias(queries: Queries, token_index: Tensor, rows: slice, tile: slice) -> Tensor:
    """0 where a query sees a key and -inf where it does not: [B, Q, K], Q at most a tile."""
    first = queries.first_key[rows, tile, None]
    last = queries.last_key[rows, tile, None]
    hidden = (token_index < first) | (token_index > last)
    zeros = hidden.new_zeros(hidden.shape, dtype=accumulation(queries.q.dtype))
    return zeros.masked_fill(hidden, NOTHING_SEEN)
