"""Attention of local queries to lined-up keys in plain torch, tile by tile.

Nothing of size L x K is made: a tile of queries meets its run of keys in at most three calls of
the block kernel, and only the calls at the run's ends carry a mask, built on the spot from the
queries' intervals.
"""

from collections.abc import Iterator

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

MOST_KEYS = 8192
"""Keys a call of the block kernel, which may hold a score for each and each of its queries."""


def attend(
    partial: OnlineSoftmax, queries: Queries, keys: Keys, spans: Tensor, how: SoftmaxParams
) -> None:
    """Add the attention of `queries` to `keys` to `partial`.

    Args:
        spans: [B, tiles, 6], from block_ranges for these queries and keys.
    """
    for rows, at, to, bias in _calls(queries, keys, spans):
        out, lse = block_attention(
            queries.q[rows, at],
            keys.k[rows, to],
            keys.v[rows, to],
            bias,
            scale=how.scale,
            softcap=how.softcap,
        )
        merge_into(partial.out[rows, at], partial.lse[rows, at], out, lse)


def attend_backward(
    grads: GradAccumulators,
    final: SavedForward,
    queries: Queries,
    keys: Keys,
    spans: Tensor,
    how: SoftmaxParams,
) -> None:
    """Add the gradients of `attend` over these keys to `grads` (dk, dv: those of `keys`)."""
    for rows, at, to, bias in _calls(queries, keys, spans):
        dq, dk, dv = block_attention_backward(
            final.grad_out[rows, at],
            queries.q[rows, at],
            keys.k[rows, to],
            keys.v[rows, to],
            final.out[rows, at],
            final.lse[rows, at],
            bias,
            scale=how.scale,
            softcap=how.softcap,
        )
        grads.dq[rows, at] += dq
        grads.dk[rows, to] += dk
        grads.dv[rows, to] += dv


def _calls(
    queries: Queries, keys: Keys, spans: Tensor
) -> Iterator[tuple[slice, slice, slice, Tensor | None]]:
    """(batch rows, queries, keys, bias) of every call of the block kernel."""
    alike = bool((spans == spans[:1]).all())
    batch = queries.q.shape[0]
    row_groups = [slice(0, batch)] if alike else [slice(b, b + 1) for b in range(batch)]
    for rows in row_groups:
        for q_start, q_stop, start, full_start, full_stop, stop in spans[rows.start].tolist():
            at = slice(q_start, q_stop)
            if full_start == full_stop:
                pieces = [(start, stop, True)]
            else:
                pieces = [
                    (start, full_start, True),
                    (full_start, full_stop, False),
                    (full_stop, stop, True),
                ]
            for piece_start, piece_stop, masked in pieces:
                for at_key in range(piece_start, piece_stop, MOST_KEYS):
                    to = slice(at_key, min(at_key + MOST_KEYS, piece_stop))
                    bias = _bias(queries, keys.token_index[to], rows, at) if masked else None
                    yield rows, at, to, bias


def _bias(queries: Queries, token_index: Tensor, rows: slice, at: slice) -> Tensor:
    """0 where a query sees a key and -inf where not: [B, Q, K], Q at most a tile."""
    first = queries.first_key[rows, at, None]
    last = queries.last_key[rows, at, None]
    hidden = (token_index < first) | (token_index > last)
    zeros = hidden.new_zeros(hidden.shape, dtype=accumulation(queries.q.dtype))
    return zeros.masked_fill(hidden, NOTHING_SEEN)
