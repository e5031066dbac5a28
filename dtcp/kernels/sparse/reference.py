"""Attention to a window of raw keys and to compressed entries, K = V, one head of keys for all.

One softmax runs over both and over a sink. Queries are taken in tiles of neighbours, whose
windows are one run of keys; entries are one run too, or, where an indexer selected them, rows
picked for every query. Nothing is ever of the size L x S: a tile's scores are the largest
temporary, and backward makes them again from the lse.

On a GPU `sparse_gpu.py` does the same: `sparse_op.py` chooses.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.sparse.indexer import sees

TILE = 64
"""Queries a tile, at most."""
SCORES = 2**24
"""Numbers a tile of scores may have: 64 MiB in fp32."""


class Sight(NamedTuple):
    """What decides which keys and entries a query sees; all on the device but `tiles`."""

    window_first: Tensor  # [B, L] int32, the first position in the query's window
    first: Tensor  # [B, L] int32, where its document starts
    last: Tensor  # [B, L] int32, its own position; -1 for padding
    key_token_index: Tensor  # [K] int32, -1 where a slot holds no key
    closing: Tensor  # [B, P] int32, position of an entry's last token
    key_run: Tensor  # [B, L, 2] int32, the keys that a query reads, from and up to
    key_readers: Tensor  # [B, K, 2] int32, the queries that read a key, from and up to
    entry_run: Tensor  # [B, L, 2] int32, the same of entries in sight
    entry_readers: Tensor  # [B, P, 2] int32
    tiles: Tensor  # [B, tiles, 6] int64: queries, keys and entries, each from and up to

    def spans(self, row: int, heads: int, selected: Tensor | None) -> Iterator["Span"]:
        """The tiles of a row, cut where their scores would be too many."""
        limit = None if selected is None else selected.shape[-1]
        for start, stop, key_start, key_stop, low, high in self.tiles[row].tolist():
            picked = limit is not None and high - low > limit
            width = key_stop - key_start + (limit if picked and limit else high - low)
            step = max(1, SCORES // (heads * max(1, width)))
            for first in range(start, stop, step):
                queries = slice(first, min(first + step, stop))
                yield Span(row, queries, slice(key_start, key_stop), slice(low, high), picked)


class Span(NamedTuple):
    """One tile of queries and what it may see."""

    row: int
    queries: slice
    keys: slice
    entries: slice
    picked: bool
    """Whether each query has entries of its own, rather than all of `entries` in sight."""


class Seen(NamedTuple):
    """The keys of one tile: shared ones [K, D], and those of each query [Q, k, D] if any."""

    shared: Tensor
    hidden: Tensor  # [Q, 1, K] bool, True where a query does not see a shared key
    own: Tensor | None
    own_hidden: Tensor | None  # [Q, 1, k] bool


def attend_tile(q: Tensor, seen: Seen, sink: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attend one tile of queries [Q, H, D]: out [Q, H, D] and lse [Q, H], sink included."""
    weights, lse = _weights(q, seen, sink, None, scale)
    out = weights[0].flatten(0, 1) @ seen.shared
    out = out.view(q.shape)
    if seen.own is not None:
        out = out.baddbmm_(weights[1], seen.own)
    return out, lse


class TileGradients(NamedTuple):
    q: Tensor
    shared: Tensor
    own: Tensor | None


def attend_tile_backward(
    grad_out: Tensor, delta: Tensor, q: Tensor, lse: Tensor, seen: Seen, scale: float
) -> TileGradients:
    """Gradients of one tile; delta [Q, H] is the sum of grad_out * out over channels."""
    weights, _ = _weights(q, seen, None, lse, scale)
    flat_q, flat_grad = q.flatten(0, 1), grad_out.flatten(0, 1)
    from_out = (flat_grad @ seen.shared.mT).view(weights[0].shape)
    of_scores = weights[0] * (from_out - delta[..., None]) * scale
    dq = (of_scores.flatten(0, 1) @ seen.shared).view(q.shape)
    # A key is a value too: it has a part in the scores and one in the output.
    dshared = of_scores.flatten(0, 1).mT @ flat_q + weights[0].flatten(0, 1).mT @ flat_grad
    if seen.own is None:
        return TileGradients(dq, dshared, None)
    of_scores = weights[1] * (grad_out @ seen.own.mT - delta[..., None]) * scale
    dq = dq.baddbmm_(of_scores, seen.own)
    return TileGradients(dq, dshared, of_scores.mT @ q + weights[1].mT @ grad_out)


def _weights(
    q: Tensor, seen: Seen, sink: Tensor | None, lse: Tensor | None, scale: float
) -> tuple[list[Tensor], Tensor]:
    """Softmax weights of shared and own keys, [Q, H, K] and [Q, H, k], and their lse [Q, H]."""
    queries, heads, _ = q.shape
    scores = [(q.flatten(0, 1) @ seen.shared.mT).view(queries, heads, -1).mul_(scale)]
    scores[0].masked_fill_(seen.hidden, float("-inf"))
    if seen.own is not None and seen.own_hidden is not None:
        scores.append((q @ seen.own.mT).mul_(scale).masked_fill_(seen.own_hidden, float("-inf")))
    if lse is None:
        parts = [score.logsumexp(-1) for score in scores]
        if sink is not None:
            parts.append(sink.expand(queries, heads))
        lse = torch.stack(parts).logsumexp(0)
    # A query that sees nothing, and has no sink, has weights 0 and not NaN.
    base = lse.nan_to_num(neginf=0.0)[..., None]
    return [score.sub_(base).exp_() for score in scores], lse


class Gathered:
    """Keys, entries and selection of a whole call, and the part of them that a tile sees."""

    def __init__(
        self, keys: Tensor, entries: Tensor | None, selected: Tensor | None, sight: Sight
    ) -> None:
        self.keys, self.entries, self.selected, self.sight = keys, entries, selected, sight

    def of(self, at: Span, dtype: torch.dtype) -> Seen:
        sight, row = self.sight, at.row
        position = sight.key_token_index[at.keys]
        first, last = sight.window_first[row, at.queries], sight.last[row, at.queries]
        hidden = ~sees(first, last, position)
        shared = self.keys[row, at.keys].to(dtype)
        if self.entries is None or at.entries.start == at.entries.stop:
            return Seen(shared, hidden[:, None], None, None)
        if at.picked:
            chosen = self.chosen(at)
            own = self.entries[row].index_select(0, chosen.clamp(min=0).flatten()).to(dtype)
            own = own.view(*chosen.shape, -1)
            return Seen(shared, hidden[:, None], own, (chosen < 0)[:, None])
        seen = sees(sight.first[row, at.queries], last, sight.closing[row, at.entries])
        shared = torch.cat((shared, self.entries[row, at.entries].to(dtype)))
        return Seen(shared, torch.cat((hidden, ~seen), dim=1)[:, None], None, None)

    def chosen(self, at: Span) -> Tensor:
        """Places of the entries that each query of a tile reads: [Q, k] int32."""
        assert self.selected is not None
        return self.selected[at.row, at.queries]


def sparse_forward(
    q: Tensor, given: Gathered, sink: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend all queries: out [B, L, H, D] in q's dtype, and lse [B, L, H]."""
    wide = accumulation(q.dtype)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=wide)
    sink = None if sink is None else sink.to(wide)
    for row in range(q.shape[0]):
        for at in given.sight.spans(row, q.shape[2], given.selected):
            mine = (row, at.queries)
            result = attend_tile(q[mine].to(wide), given.of(at, wide), sink, scale)
            out[mine], lse[mine] = result
    return out, lse


def sparse_backward(
    grad_out: Tensor,
    q: Tensor,
    given: Gathered,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, keys, entries and sink, the latter three in the dtype of accumulation."""
    wide = accumulation(q.dtype)
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1)
    dq, dkeys = q.new_empty(q.shape), given.keys.new_zeros(given.keys.shape, dtype=wide)
    entries = given.entries
    dentries = None if entries is None else entries.new_zeros(entries.shape, dtype=wide)
    for row in range(q.shape[0]):
        for at in given.sight.spans(row, q.shape[2], given.selected):
            mine, seen = (row, at.queries), given.of(at, wide)
            grad, mine_q = grad_out[mine].to(wide), q[mine].to(wide)
            grads = attend_tile_backward(grad, delta[mine], mine_q, lse[mine], seen, scale)
            dq[mine] = grads.q
            width = at.keys.stop - at.keys.start
            dkeys[row, at.keys] += grads.shared[:width]
            if dentries is None:
                continue
            if grads.own is None:
                dentries[row, at.entries] += grads.shared[width:]
            else:
                chosen = given.chosen(at).clamp(min=0).flatten()
                dentries[row].index_add_(0, chosen, grads.own.flatten(0, 1))
    dsink = None
    if sink is not None:
        dsink = -(torch.exp(sink.to(wide) - lse) * delta).sum((0, 1)).to(sink.dtype)
    return dq, dkeys, dentries, dsink
