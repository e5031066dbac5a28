"""The indexer: which entries each query reads, found for some queries at a time.

A kernel scores all entries that they may see at once; plain torch, whose scores are of each head,
takes entries in steps, with a running selection.
"""

from collections.abc import Iterator, Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.sparse.index_kernel import IndexScores, index_kernel, plain_scores, visible

NO_ENTRY = -1
"""In a selection: no entry."""
MAX_INDEX_SCORES = 2**24
"""Scores in one step, in plain torch before heads are summed: 64 MiB in fp32."""


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
    kernel = index_kernel(q, keys)
    for row, row_tiles in enumerate(tiles.tolist()):
        of_row = _Given(q[row], weight[row], keys[row], first[row], last[row], closing[row])
        blocks = [_Block(*tile[:2], *tile[4:]) for tile in row_tiles]
        for block in blocks if kernel is None else _joined(blocks, num_selected):
            queries, given = slice(block.start, block.stop), of_row.of(block)
            if block.width <= num_selected:
                out[row, queries, : block.width] = _all_seen(given, block.low)
            elif kernel is None:
                out[row, queries] = _select(given, block.low, num_selected)
            else:
                out[row, queries] = _select_at_once(kernel, given, block.low, num_selected)
    return out


class _Block(NamedTuple):
    """Neighbouring queries, and the entries that any of them may see."""

    start: int
    stop: int
    low: int
    high: int

    @property
    def width(self) -> int:
        return self.high - self.low


class _Given(NamedTuple):
    """What queries are scored by; see top_entries."""

    q: Tensor  # [Q, H, D]
    weight: Tensor  # [Q, H]
    keys: Tensor  # [P, D]
    first: Tensor  # [Q]
    last: Tensor  # [Q]
    closing: Tensor  # [P]

    def of(self, block: _Block) -> "_Given":
        mine, seen = slice(block.start, block.stop), slice(block.low, block.high)
        return _Given(
            self.q[mine],
            self.weight[mine],
            self.keys[seen],
            self.first[mine],
            self.last[mine],
            self.closing[seen],
        )


def _joined(blocks: Sequence[_Block], num_selected: int) -> list[_Block]:
    """Blocks of up to MAX_INDEX_SCORES: neighbours that see the same are joined, large ones cut."""
    groups: list[_Block] = []
    for block in blocks:
        alike = groups and block.low < groups[-1].high
        if alike and min(block.width, groups[-1].width) > num_selected:
            start, _, low, high = groups[-1]
            both = _Block(start, block.stop, min(low, block.low), max(high, block.high))
            if (both.stop - both.start) * both.width <= MAX_INDEX_SCORES:
                groups[-1] = both
                continue
        groups.append(block)
    return [
        block._replace(start=start, stop=stop)
        for block in groups
        for start, stop in steps(
            block.start, block.stop, max(1, MAX_INDEX_SCORES // max(1, block.width))
        )
    ]


def _all_seen(given: _Given, low: int) -> Tensor:
    """The entries that each query sees, where they are too few to need a score: [Q, P]."""
    seen = visible(given.first, given.last, given.closing)
    return compact(places_from(seen, low), seen, seen.shape[1], fill=NO_ENTRY)


def _select_at_once(kernel: IndexScores, given: _Given, low: int, num_selected: int) -> Tensor:
    """The selection of some queries among the entries from `low` on, all scored: [Q, k]."""
    score = kernel(*given)
    chosen = highest(score, num_selected) & (score > -inf)
    return compact(places_from(score, low), chosen, num_selected, fill=NO_ENTRY)


def _select(given: _Given, low: int, num_selected: int) -> Tensor:
    """The same in steps of few scores."""
    q, weight, keys, first, last, closing = given
    queries, heads, _ = q.shape
    best = q.new_full((queries, num_selected), -inf, dtype=accumulation(q.dtype))
    place = q.new_full((queries, num_selected), NO_ENTRY, dtype=torch.int32)
    q, weight = q.to(best.dtype), weight.to(best.dtype)
    for start, stop in steps(0, len(keys), max(1, MAX_INDEX_SCORES // (queries * heads))):
        score = plain_scores(q, weight, keys[start:stop], first, last, closing[start:stop])
        best, place = _best(
            torch.cat((best, score), dim=1),
            torch.cat((place, places_from(score, low + start)), dim=1),
            num_selected,
        )
    return compact(place, best > -inf, num_selected, fill=NO_ENTRY)


def places_from(like: Tensor, low: int) -> Tensor:
    """The places from `low` on, for each query alike: [Q, P] int32."""
    stop = low + like.shape[1]
    return torch.arange(low, stop, dtype=torch.int32, device=like.device).expand_as(like)


def _best(score: Tensor, place: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each row and their places, order kept; of equal ones the first."""
    keep = highest(score, number)
    return compact(score, keep, number, fill=-inf), compact(place, keep, number, fill=NO_ENTRY)


def highest(score: Tensor, number: int) -> Tensor:
    """Which scores of each row are among its highest; of equal ones the first: bool."""
    least = score.topk(number, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, equal = score > least, score == least
    room = number - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))


def compact(x: Tensor, keep: Tensor, length: int, *, fill: float) -> Tensor:
    """Move what is kept of each row to its start, in order; unlike x[keep], with no host sync."""
    slot = torch.where(keep, keep.cumsum(1) - 1, length)
    out = x.new_full((x.shape[0], length + 1), fill)
    return out.scatter_(1, slot, x)[:, :length]


def steps(low: int, high: int, step: int) -> Iterator[tuple[int, int]]:
    """Starts and stops of stretches of `step`, the last one shorter."""
    for start in range(low, high, step):
        yield start, min(start + step, high)
