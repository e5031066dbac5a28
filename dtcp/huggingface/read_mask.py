"""A mask function of transformers, sees(row, head, query, key), read as a mask of ours."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtcp.sequence.masks import (
    Bidirectional,
    Causal,
    Mask,
    SlidingWindow,
)

FAR = 2**20
"""The query whose keys are counted; a window as wide as this is taken for none."""

NEAR = 64
"""Queries from the start, and keys to the right, that are looked at too."""


def read_mask(sees: Callable[..., Any]) -> Mask | None:
    """The mask that sees the same keys, for all queries that are tried; None if none does."""
    row = _row(sees, FAR)
    if row is None or not row.any():
        return None
    keys = row.nonzero().flatten()
    first, last = int(keys[0]), int(keys[-1])
    left = None if first == 0 else FAR - first + 1
    right = None if last == len(row) - 1 else last - FAR
    queries = [*range(NEAR), 12_345, FAR]
    if left is not None:
        queries += [left - 2, left - 1, left, left + 1, 2 * left + 1, 3 * left]
    if not all(_agrees(sees, at, left, right) for at in queries if 0 <= at <= FAR):
        return None
    return _mask(left, right)


def _row(sees: Callable[..., Any], query: int) -> Tensor | None:
    zero, keys = torch.tensor(0), torch.arange(query + NEAR)
    try:
        seen = sees(zero, zero, torch.tensor(query), keys)
    except IndexError:
        # It looks its tokens up in a table, whose meaning is not in the function.
        return None
    return torch.as_tensor(seen).expand(len(keys))


def _agrees(sees: Callable[..., Any], query: int, left: int | None, right: int | None) -> bool:
    row = _row(sees, query)
    back = query - torch.arange(query + NEAR)
    expected = torch.ones_like(back, dtype=torch.bool)
    if left is not None:
        expected &= back < left
    if right is not None:
        expected &= -back <= right
    return row is not None and torch.equal(row, expected)


def _mask(left: int | None, right: int | None) -> Mask | None:
    if left is None:
        masks = {None: Bidirectional(), 0: Causal()}
        return masks.get(right)
    if left < 1 or (right is not None and right < 0):
        return None
    return Causal() & SlidingWindow(left) if right == 0 else SlidingWindow(left, right=right)
