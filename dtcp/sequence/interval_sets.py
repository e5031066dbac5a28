"""Sets of keys as several disjoint intervals: their intersection (`&`) and union (`|`).

An interval is the first and the last key of each of many tokens, empty where last < first.
Everything is elementwise, so the tokens may be whole rows or the first ones of runs.
"""

from collections.abc import Sequence
from itertools import combinations, product

import torch
from torch import Tensor

Interval = tuple[Tensor, Tensor]
"""The first and the last key of every token."""


def emptied(where: Tensor, interval: Interval) -> Interval:
    """The same interval, but empty (0 to -1) where a token sees nothing."""
    first, last = interval
    return first.masked_fill(where, 0), last.masked_fill(where, -1)


def intersection(left: Sequence[Interval], right: Sequence[Interval]) -> list[Interval]:
    """The keys in both: one interval for each pair."""
    pairs = [
        (torch.maximum(a_first, b_first), torch.minimum(a_last, b_last))
        for (a_first, a_last), (b_first, b_last) in product(left, right)
    ]
    return [emptied(last < first, (first, last)) for first, last in pairs]


def union(left: Sequence[Interval], right: Sequence[Interval]) -> list[Interval]:
    """The keys in either: as many intervals as both have together.

    Of two that overlap or touch, one becomes their union and the other empty.
    """
    out = list(left)
    for each in right:
        for index, other in enumerate(out):
            touch, joined = _joined(other, each)
            out[index] = emptied(touch, other)
            each = joined
        out.append(each)
    return out


def _joined(a: Interval, b: Interval) -> tuple[Tensor, Interval]:
    """Where two intervals overlap or touch, and b, which takes in a there."""
    (a_first, a_last), (b_first, b_last) = a, b
    touch = (a_first <= a_last) & (b_first <= b_last)
    touch &= (a_first <= b_last + 1) & (b_first <= a_last + 1)
    first = torch.where(touch, torch.minimum(a_first, b_first), b_first)
    return touch, (first, torch.where(touch, torch.maximum(a_last, b_last), b_last))


def overlap(intervals: Sequence[Interval]) -> Tensor:
    """Which tokens have a key in more than one interval."""
    found = torch.zeros_like(intervals[0][0], dtype=torch.bool)
    for (a_first, a_last), (b_first, b_last) in combinations(intervals, 2):
        found |= torch.maximum(a_first, b_first) <= torch.minimum(a_last, b_last)
    return found
