"""Attention to a window of raw keys and to compressed entries in plain torch, tile by tile.

One softmax runs over both and over a sink. A tile is a few neighbouring queries, whose windows
are one run of keys; their entries are one run too or, where an indexer selected them, rows
gathered for each query. Nothing of size L x S is ever made: the scores of one tile are the
largest temporary, and backward recomputes them from the lse.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.softmax.merge import sink_gradient_of
from dtcp.kernels.sparse.index_kernel import visible
from dtcp.kernels.sparse.types import SparseGradients, SparseKeys

MAX_TILE_SCORES = 2**24
"""Scores in one tile: 64 MiB in fp32."""


class ReferenceSparseAttention:
    """`SparseKernel` in plain torch, on any device and in any dtype."""

    def forward(
        self, q: Tensor, keys: SparseKeys, sink: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        wide = accumulation(q.dtype)
        out = q.new_empty(*q.shape[:-1], keys.value_dim)
        lse = q.new_empty(q.shape[:-1], dtype=wide)
        sink = None if sink is None else sink.to(wide)
        for tile in _tiles(keys, q.shape[0], q.shape[2]):
            rows = (tile.row, tile.queries)
            tile_keys = _tile_keys(keys, tile, wide)
            out[rows], lse[rows] = _attend_tile(q[rows].to(wide), tile_keys, sink, scale)
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        keys: SparseKeys,
        sink: Tensor | None,
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> SparseGradients:
        wide = accumulation(q.dtype)
        delta = (grad_out.to(wide) * out.to(wide)).sum(-1)
        dq, dkeys = q.new_empty(q.shape), keys.keys.new_zeros(keys.keys.shape, dtype=wide)
        entries = keys.entries
        dentries = None if entries is None else entries.new_zeros(entries.shape, dtype=wide)
        for tile in _tiles(keys, q.shape[0], q.shape[2]):
            rows, tile_keys = (tile.row, tile.queries), _tile_keys(keys, tile, wide)
            tile_grad, tile_q = grad_out[rows].to(wide), q[rows].to(wide)
            grads = _attend_tile_backward(
                tile_grad, delta[rows], tile_q, lse[rows], tile_keys, scale
            )
            dq[rows] = grads.q
            width = tile.keys.stop - tile.keys.start
            dkeys[tile.row, tile.keys] += grads.shared[:width]
            if dentries is None:
                continue
            if grads.own is None:
                dentries[tile.row, tile.entries] += grads.shared[width:]
            else:
                places = _selected(keys, tile).clamp(min=0).flatten()
                dentries[tile.row].index_add_(0, places, grads.own.flatten(0, 1))
        dsink = None if sink is None else sink_gradient_of(delta, lse, sink)
        return SparseGradients(dq, dkeys, dentries, dsink)


class _Tile(NamedTuple):
    """Some queries of one row, and the keys and entries that they may see."""

    row: int
    queries: slice
    keys: slice
    entries: slice
    has_selection: bool
    """Whether each query reads entries of its own, rather than all that it sees in `entries`."""


def _tiles(keys: SparseKeys, batch: int, heads: int) -> Iterator[_Tile]:
    """The tiles of all rows, cut where they would have more than MAX_TILE_SCORES."""
    limit = None if keys.selected is None else keys.selected.shape[-1]
    for row in range(batch):
        for start, stop, key_start, key_stop, low, high in keys.sight.tiles[row].tolist():
            has_selection = limit is not None and high - low > limit
            entries = limit if has_selection and limit else high - low
            step = max(1, MAX_TILE_SCORES // (heads * max(1, key_stop - key_start + entries)))
            for first in range(start, stop, step):
                queries = slice(first, min(first + step, stop))
                yield _Tile(
                    row, queries, slice(key_start, key_stop), slice(low, high), has_selection
                )


class _TileKeys(NamedTuple):
    """The keys of one tile: those that all its queries share, and those of each query, if any."""

    shared: Tensor  # [K, D]
    hidden: Tensor  # [Q, 1, K] bool, True where a query does not see a shared key
    own: Tensor | None  # [Q, k, D]
    own_hidden: Tensor | None  # [Q, 1, k] bool
    value_dim: int  # channels of a key that are its value


def _tile_keys(keys: SparseKeys, tile: _Tile, dtype: torch.dtype) -> _TileKeys:
    sight, row = keys.sight, tile.row
    token_index = sight.key_token_index[tile.keys]
    first, last = sight.window_first[row, tile.queries], sight.last[row, tile.queries]
    hidden = ~visible(first, last, token_index)
    shared = keys.keys[row, tile.keys].to(dtype)
    if keys.entries is None or tile.entries.start == tile.entries.stop:
        return _TileKeys(shared, hidden[:, None], None, None, keys.value_dim)
    if tile.has_selection:
        places = _selected(keys, tile)
        own = keys.entries[row].index_select(0, places.clamp(min=0).flatten()).to(dtype)
        own = own.view(*places.shape, -1)
        return _TileKeys(shared, hidden[:, None], own, (places < 0)[:, None], keys.value_dim)
    seen = visible(sight.first[row, tile.queries], last, sight.closing[row, tile.entries])
    shared = torch.cat((shared, keys.entries[row, tile.entries].to(dtype)))
    hidden = torch.cat((hidden, ~seen), dim=1)[:, None]
    return _TileKeys(shared, hidden, None, None, keys.value_dim)


def _selected(keys: SparseKeys, tile: _Tile) -> Tensor:
    """Places of the entries that each query of a tile reads: [Q, k] int32."""
    assert keys.selected is not None
    return keys.selected[tile.row, tile.queries]


def _attend_tile(
    q: Tensor, keys: _TileKeys, sink: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend the queries [Q, H, D] of a tile: out [Q, H, V] and lse [Q, H], sink included."""
    weights, lse = _weights(q, keys, sink, None, scale)
    out = weights[0].flatten(0, 1) @ keys.shared[:, : keys.value_dim]
    out = out.view(*q.shape[:-1], keys.value_dim)
    if keys.own is not None:
        out = out.baddbmm_(weights[1], keys.own[..., : keys.value_dim])
    return out, lse


class _TileGradients(NamedTuple):
    q: Tensor
    shared: Tensor
    own: Tensor | None


def _attend_tile_backward(
    grad_out: Tensor, delta: Tensor, q: Tensor, lse: Tensor, keys: _TileKeys, scale: float
) -> _TileGradients:
    """Gradients of one tile; delta [Q, H] is the sum of grad_out * out over channels."""
    weights, _ = _weights(q, keys, None, lse, scale)
    flat_q, flat_grad = q.flatten(0, 1), grad_out.flatten(0, 1)
    values = keys.value_dim
    d_weights = (flat_grad @ keys.shared[:, :values].mT).view(weights[0].shape)
    d_scores = weights[0] * (d_weights - delta[..., None]) * scale
    dq = (d_scores.flatten(0, 1) @ keys.shared).view(q.shape)
    # A key is a value too: its gradient has a part from the scores and one from the output.
    dshared = d_scores.flatten(0, 1).mT @ flat_q
    dshared[:, :values] += weights[0].flatten(0, 1).mT @ flat_grad
    if keys.own is None:
        return _TileGradients(dq, dshared, None)
    d_weights = grad_out @ keys.own[..., :values].mT
    d_scores = weights[1] * (d_weights - delta[..., None]) * scale
    dq, down = dq.baddbmm_(d_scores, keys.own), d_scores.mT @ q
    down[..., :values] += weights[1].mT @ grad_out
    return _TileGradients(dq, dshared, down)


def _weights(
    q: Tensor, keys: _TileKeys, sink: Tensor | None, lse: Tensor | None, scale: float
) -> tuple[list[Tensor], Tensor]:
    """Softmax weights of shared and own keys, [Q, H, K] and [Q, H, k], and their lse [Q, H]."""
    queries, heads, _ = q.shape
    scores = [(q.flatten(0, 1) @ keys.shared.mT).view(queries, heads, -1).mul_(scale)]
    scores[0].masked_fill_(keys.hidden, float("-inf"))
    if keys.own is not None and keys.own_hidden is not None:
        scores.append((q @ keys.own.mT).mul_(scale).masked_fill_(keys.own_hidden, float("-inf")))
    if lse is None:
        parts = [score.logsumexp(-1) for score in scores]
        if sink is not None:
            parts.append(sink.expand(queries, heads))
        lse = torch.stack(parts).logsumexp(0)
    # A query that sees nothing, and has no sink, has weights 0 and not NaN.
    base = lse.nan_to_num(neginf=0.0)[..., None]
    return [score.sub_(base).exp_() for score in scores], lse
