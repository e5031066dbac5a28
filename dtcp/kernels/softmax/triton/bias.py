"""A score bias in the kernels: what is added at each distance, and the sums of its gradients.

Tables and profiles are one thing here: rows of N numbers, at neighbouring distances, whose first
and last hold for all distances beyond them. A table's rows are the same for all queries, without
being repeated in memory; those of profiles are one product of matrices.

A query has one key at each distance. So the gradients between the ends are stored where they
belong, each by one program and once, and the ends and the slope are sums of each query: nothing is
added by atomics. What is stored is as large as queries times N, so queries whose numbers are more
than MOST_NUMBERS are taken in several goes (attention.py).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtcp.kernels.softmax.score_bias import ScoreBias
from dtcp.kernels.softmax.triton.tiles import token_pointers
from dtcp.kernels.softmax.types import Queries
from dtcp.kernels.triton_constants import LOG2_E
from dtcp.kernels.triton_support import StridedTensor

MOST_NUMBERS = 1 << 27
"""In the rows of the queries of one go, which are fp32: 512 MiB, and backward as many again."""
WHOLE_TILES = 128
"""Queries in the tiles of every kernel divide this."""


class BiasOperands(NamedTuple):
    """A score bias, as a kernel takes it; None for what it does not have."""

    rows: Any  # StridedTensor [B, L, H, N]
    ends: Any  # [H, 2], the first and the last of a table: profiles add nothing there
    slope: Any  # [H]
    query_index: Any  # [L]
    key_index: Any  # [K]
    lowest: Any  # the distance of the first of the N
    highest: Any  # and of the last

    @classmethod
    def of(cls, bias: ScoreBias | None, q: Tensor, key_index: Tensor) -> "BiasOperands | None":
        """For queries [B, L, H, D], which the bias is of."""
        if bias is None:
            return None
        rows, table, distances = bias.rows, bias.table, bias.distances
        return cls(
            rows=None if rows is None else StridedTensor.of(rows.expand(*q.shape[:3], -1)),
            ends=None if table is None else torch.stack((table[:, 0], table[:, -1]), dim=1),
            slope=None if bias.slope is None else bias.slope.contiguous(),
            query_index=bias.query_index.contiguous(),
            key_index=key_index.contiguous(),
            lowest=distances.start,
            highest=distances.stop - 1,
        )


class BiasGradients(NamedTuple):
    """What a kernel leaves of the gradients of a score bias, in fp32; None as above."""

    rows: Any  # StridedTensor [B, L, H, N]; not written at the ends
    ends: Any  # StridedTensor [B, L, H, 2]
    slope: Any  # StridedTensor [B, L, H]

    @classmethod
    def empty(cls, bias: ScoreBias | None, q: Tensor) -> "BiasGradients | None":
        """Zeros."""
        if bias is None:
            return None
        widths = (
            (len(bias.distances),) if bias.has_rows else None,
            (2,) if bias.table is not None else None,
            () if bias.slope is not None else None,
        )
        sizes = (None if width is None else (*q.shape[:3], *width) for width in widths)
        new = (None if x is None else q.new_zeros(x, dtype=torch.float32) for x in sizes)
        return cls(*(None if x is None else StridedTensor.of(x) for x in new))

    def add_to(self, bias: ScoreBias) -> None:
        """Sum them up in the bias."""
        if self.rows is not None:
            rows = self.rows.pointer
            if self.ends is not None:
                rows[..., 0] += self.ends.pointer[..., 0]
                rows[..., -1] += self.ends.pointer[..., 1]
            bias.add_row_gradients(rows)
        slope = bias.gradients[1]
        if slope is not None:
            slope += self.slope.pointer.sum((0, 1))


def in_goes(queries: Queries) -> Iterator[tuple[slice, Queries]]:
    """The queries of each go, and where they are: all at once where there is no bias by rows."""
    q, bias = queries.q, queries.bias
    batch, length, heads, _ = q.shape
    most = length
    if bias is not None and bias.has_rows:
        each = batch * heads * len(bias.distances)
        most = max(MOST_NUMBERS // each, 1)
        most = most // WHOLE_TILES * WHOLE_TILES or most
    if most >= length:
        yield slice(0, length), queries
        return
    assert bias is not None
    for start in range(0, length, most):
        own = slice(start, min(start + most, length))
        q, first, last = (x[:, own] for x in queries[:3])
        yield own, Queries(q, first, last, bias.of_queries(own))


class TokenIndex(NamedTuple):
    """Token indices of a tile, in a kernel; past the last token, that of the last."""

    tokens: Any  # [rows]
    least: Any
    most: Any


@triton.jit
def token_index_of(index, tile, stop, ASCENDING: tl.constexpr):
    """Of a tile that ends at `stop`; ASCENDING where it holds keys, all of them real."""
    tokens = tl.load(index + tl.minimum(tile.first + tile.rows, stop - 1)).to(tl.int32)
    if ASCENDING:
        least = tl.load(index + tile.first).to(tl.int32)
        behind = tl.minimum(tile.first + tile.rows.shape[0], stop)
        most = tl.load(index + behind - 1).to(tl.int32)
    else:
        least, most = tl.min(tokens), tl.max(tokens)
    return TokenIndex(tokens, least, most)


@triton.jit
def add_bias(scores, bias, tile, length, of_queries, of_keys, KEYS: tl.constexpr):
    """Scores in units of log 2 with what is added by distance.

    Args:
        tile: of the queries.
        of_queries, of_keys: their token indices.
        KEYS: the dim of the keys.
    """
    if bias.slope is not None:
        distance = _distances(of_queries, of_keys, KEYS).to(tl.float32)
        scores += tl.load(bias.slope + tile.head).to(tl.float32) * LOG2_E * distance
    if bias.rows is not None:
        left, right = _beyond(bias, of_queries, of_keys)
        # Nearly all blocks of a long row lie beyond an end, where one number is that of all keys.
        if left | right:
            if bias.ends is not None:
                end = tl.load(bias.ends + 2 * tile.head + tl.where(left, 0, 1))
                scores += end * LOG2_E
        else:
            base = _first_row(bias.rows, tile)
            rows = _row_offsets(bias.rows, tile, length, KEYS)
            place = _places(bias, of_queries, of_keys, KEYS)
            scores += tl.load(base + (rows + place)) * LOG2_E
    return scores


@triton.jit
def add_bias_gradients(sums, d_scores, bias, gradients, tile, length, of_queries, of_keys, seen):
    """Store what each key adds at its distance; returns the sums of each query with the others.

    Args:
        sums: of the first end, the last end and the slope, each [queries].
        d_scores: [queries, keys], 0 where a key is hidden.
        seen: [queries, keys] or [queries, 1]; where not, the place may be another key's.
    """
    first, last, slope = sums
    if gradients.slope is not None:
        distance = _distances(of_queries, of_keys, 1).to(tl.float32)
        slope += tl.sum(d_scores * distance, 1)
    if gradients.rows is not None:
        left, right = _beyond(bias, of_queries, of_keys)
        if left | right:
            if gradients.ends is not None:
                total = tl.sum(d_scores, 1)
                first += tl.where(left, total, 0.0)
                last += tl.where(left, 0.0, total)
        else:
            place, width = _places(bias, of_queries, of_keys, 1), _width(bias)
            base = _first_row(gradients.rows, tile)
            rows = _row_offsets(gradients.rows, tile, length, 1)
            inner = seen & (place > 0) & (place < width)
            tl.store(base + (rows + place), d_scores, mask=inner)
            if gradients.ends is not None:
                first += tl.sum(tl.where(place == 0, d_scores, 0.0), 1)
                # A table of one number has one end.
                last += tl.sum(tl.where((place == width) & (place > 0), d_scores, 0.0), 1)
    return first, last, slope


@triton.jit
def _distances(of_queries, of_keys, KEYS: tl.constexpr):
    """[queries, keys] or [keys, queries]."""
    keys = tl.expand_dims(of_keys.tokens, 1 - KEYS)
    return keys - tl.expand_dims(of_queries.tokens, KEYS)


@triton.jit
def _places(bias, of_queries, of_keys, KEYS: tl.constexpr):
    """Which of the N numbers of its query each score has."""
    distance = _distances(of_queries, of_keys, KEYS) - bias.lowest
    return tl.minimum(tl.maximum(distance, 0), _width(bias))


@triton.jit
def _width(bias):
    return bias.highest - bias.lowest


@triton.jit
def _beyond(bias, of_queries, of_keys):
    """Whether all scores of a block have the first of the N numbers, or all the last."""
    left = of_keys.most - of_queries.least <= bias.lowest
    return left, of_keys.least - of_queries.most >= bias.highest


@triton.jit
def _first_row(x, tile):
    """Where the numbers of a tile's first query start."""
    base = x.pointer + tile.batch.to(tl.int64) * x.strides[0]
    return base + tile.head.to(tl.int64) * x.strides[2] + tile.first.to(tl.int64) * x.strides[1]


@triton.jit
def _row_offsets(x, tile, length, KEYS: tl.constexpr):
    """How far behind that each query's start, the last one's past it; in_goes keeps it small."""
    rows = tl.minimum(tile.rows, length - 1 - tile.first) * x.strides[1]
    return tl.expand_dims(rows, KEYS)


@triton.jit
def store_bias_sums(gradients, sums, tile, length):
    """Leave the sums of each query, which no other program has."""
    first, last, slope = sums
    real = tile.first + tile.rows < length
    if gradients.ends is not None:
        ends = token_pointers(gradients.ends, tile)
        tl.store(ends, first, mask=real)
        tl.store(ends + 1, last, mask=real)
    if gradients.slope is not None:
        tl.store(token_pointers(gradients.slope, tile), slope, mask=real)
