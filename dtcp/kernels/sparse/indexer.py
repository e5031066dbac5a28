"""The indexer: which entries each query reads, found tile by tile with a running selection."""

from collections.abc import Iterator
from math import inf

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation

NO_ENTRY = -1
"""In a selection: no entry."""
MAX_INDEX_SCORES = 2**24
"""Scores in one step of a tile, before heads are summed: 64 MiB in fp32."""


def top_entries(
    q: Tensor,
    weight: Tensor,
    keys: Tensor,
    first: Tensor,
    last: Tensor,
    closing: Tensor,
    tiles: Tensor,
    num_selected: int,
) -> Tensor:
    """Select the entries with the highest scores, sum_h weight_h * relu(q_h . key), of those seen.

    Of equal scores the earlier entry wins, so that the selection depends on the scores alone.

    Args:
        q: [B, L, H, D].
        weight: [B, L, H].
        keys: [B, P, D], in ascending order of their entries.
        first, last, closing, tiles: see Sight.
        num_selected: entries per query, at most.
    Returns:
        [B, L, num_selected] int32, ascending places among the entries, then NO_ENTRY.

    From DeepSeek-AI 2025, DeepSeek-V3.2-Exp, equation 1,
    https://github.com/deepseek-ai/DeepSeek-V3.2-Exp
    """
    out = q.new_full((*q.shape[:2], num_selected), NO_ENTRY, dtype=torch.int32)
    for row, row_tiles in enumerate(tiles.tolist()):
        for start, stop, _, _, low, high in row_tiles:
            sight = (first[row, start:stop], last[row, start:stop], closing[row])
            if high - low <= num_selected:
                out[row, start:stop, : high - low] = _all_seen(*sight, low, high)
                continue
            tile = (q[row, start:stop], weight[row, start:stop], keys[row])
            out[row, start:stop] = _select(*tile, *sight, low, high, num_selected)
    return out


def visible(first: Tensor, last: Tensor, token_index: Tensor) -> Tensor:
    """Whether each query sees a token, or the entry that closes with it: [Q, P] bool.

    Args:
        first, last: [Q], the interval of token indices that a query sees.
        token_index: [P].
    """
    return (token_index >= first[:, None]) & (token_index <= last[:, None])


def _all_seen(first: Tensor, last: Tensor, closing: Tensor, low: int, high: int) -> Tensor:
    """The entries that each query sees, where they are too few to need a score: [Q, high - low]."""
    seen = visible(first, last, closing[low:high])
    place = torch.arange(low, high, dtype=torch.int32, device=closing.device)
    return _compact(place.expand_as(seen), seen, high - low, fill=NO_ENTRY)


def _select(
    q: Tensor,
    weight: Tensor,
    keys: Tensor,
    first: Tensor,
    last: Tensor,
    closing: Tensor,
    low: int,
    high: int,
    num_selected: int,
) -> Tensor:
    """The selection of one tile of queries [Q, H, D] among the entries [low, high): [Q, k]."""
    queries, heads, _ = q.shape
    best = q.new_full((queries, num_selected), -inf, dtype=accumulation(q.dtype))
    place = q.new_full((queries, num_selected), NO_ENTRY, dtype=torch.int32)
    q, weight = q.to(best.dtype), weight.to(best.dtype)
    for start, stop in _steps(low, high, max(1, MAX_INDEX_SCORES // (queries * heads))):
        scores = (q.flatten(0, 1) @ keys[start:stop].to(best.dtype).mT).relu_()
        score = torch.einsum("qhp,qh->qp", scores.unflatten(0, (queries, heads)), weight)
        score = score.masked_fill(~visible(first, last, closing[start:stop]), -inf)
        places = torch.arange(start, stop, dtype=torch.int32, device=q.device)
        best, place = _best(
            torch.cat((best, score), dim=1),
            torch.cat((place, places.expand(queries, -1)), dim=1),
            num_selected,
        )
    chosen = best > -inf
    return _compact(place, chosen, num_selected, fill=NO_ENTRY)


def _best(score: Tensor, place: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each row and their places, order kept; of equal ones the first."""
    least = score.topk(number, dim=1).values[:, -1:]
    above, equal = score > least, score == least
    room = number - above.sum(1, keepdim=True)
    keep = above | (equal & (equal.cumsum(1) <= room))
    return _compact(score, keep, number, fill=-inf), _compact(place, keep, number, fill=NO_ENTRY)


def _compact(x: Tensor, keep: Tensor, length: int, *, fill: float) -> Tensor:
    """Move what is kept of each row to its start, in order; unlike x[keep], with no host sync."""
    slot = torch.where(keep, keep.cumsum(1) - 1, length)
    out = x.new_full((x.shape[0], length + 1), fill)
    return out.scatter_(1, slot, x)[:, :length]


def _steps(low: int, high: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(low, high, step):
        yield start, min(start + step, high)
