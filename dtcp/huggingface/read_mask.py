"""Read a mask function of transformers, mask_function(row, head, query, key), as a Mask.

A function that looks up blocks of tokens (images, in a table of numbers) is read as if its row were
all text, and then as if it were one image: for rows longer than any that a model could be run on.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dtcp.sequence.arguments import WHOLE_NUMBERS
from dtcp.sequence.masks import (
    And,
    AttentionChunks,
    Bidirectional,
    BlockBidirectional,
    Causal,
    Mask,
    SlidingWindow,
)

FAR = 2**20
"""The query whose keys are counted; a window as wide as this counts as none."""

NEAR = 64
"""Queries from the start, and keys to the right of a query, that are tried too."""

TEXT, ONE_IMAGE = -1, 0
"""Stands for every number in a table of blocks."""


class _BlocksOf(TorchFunctionMode):
    """Inside, a table of the blocks of a row's tokens gives one number for any token index.

    Args:
        block: [1, S], of the row that a model is run on, negative for none. A tensor that says the
            same, with its own numbers from 0 on, is such a table.
        number: what reading the table gives.
    """

    def __init__(self, block: Tensor, number: int) -> None:
        super().__init__()
        self.block, self.number, self.was_read = block.cpu(), number, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], tuple) and self._is_said_by(args[0]):
            self.was_read = True
            index = torch.broadcast_tensors(*map(torch.as_tensor, args[1]))[0]
            return torch.full_like(index, self.number)
        return func(*args, **(kwargs or {}))

    def _is_said_by(self, table: Tensor) -> bool:
        if table.shape != self.block.shape or table.dtype not in WHOLE_NUMBERS:
            return False
        table, none = table.cpu(), self.block < 0
        runs, blocks = (x.unique(return_inverse=True)[1] for x in (table, self.block))
        is_text = (table[none] == TEXT).all() and (table[~none] >= 0).all()
        return bool(is_text) and torch.equal(runs, blocks)


def read_block_mask(mask_function: Callable[..., Any], block: Tensor) -> tuple[Mask | None, bool]:
    """The mask that a function stands for which may look up blocks, and whether it looks them up.

    Args:
        block: [1, S], of the row that the function was made for; negative for tokens in none.
    """
    with _BlocksOf(block, TEXT) as blocks:
        of_text = read_mask(mask_function)
    if of_text is None or not blocks.was_read:
        return of_text, False
    with _BlocksOf(block, ONE_IMAGE):
        of_image = read_mask(mask_function)
    candidates: dict[Mask, Mask] = {Bidirectional(): of_text | BlockBidirectional()}
    if isinstance(of_text, And):
        # The other way round: no window ends within an image as short as those of a survey.
        candidates[of_text.right] = (of_text.left | BlockBidirectional()) & of_text.right
    return (None if of_image is None else candidates.get(of_image)), True


def read_mask(mask_function: Callable[..., Any]) -> Mask | None:
    """The mask that lets every query tried see the same keys; None if no mask does."""
    row = _row(mask_function, FAR)
    if row is None or not row.any():
        return None
    seen = row.to(torch.uint8)
    first, last = int(seen.argmax()), len(seen) - 1 - int(seen.flip(0).argmax())
    left = None if first == 0 else FAR - first + 1
    right = None if last == len(row) - 1 else last - FAR
    queries = [*range(NEAR), 12_345, FAR]
    if left is not None:
        queries += [left - 2, left - 1, left, left + 1, 2 * left + 1, 3 * left]
    queries = [query for query in queries if 0 <= query <= FAR]
    if all(_agrees(mask_function, query, left, right) for query in queries):
        return _mask(left, right)
    return _chunks(mask_function)


def _chunks(mask_function: Callable[..., Any]) -> Mask | None:
    """The causal mask in which every query tried sees its chunk of the row alone."""
    low, high = 0, FAR
    while high - low > 1:  # A query sees the first key, up to the end of the first chunk.
        middle = (low + high) // 2
        row = _row(mask_function, middle)
        low, high = (middle, high) if row is not None and bool(row[0]) else (low, middle)
    size = high
    near = (size - 1, size, size + 1, 2 * size - 1, 2 * size, 3 * size + size // 2)
    for query in (*range(NEAR), *near, 12_345, FAR):
        if query > FAR:
            continue
        row, keys = _row(mask_function, query), torch.arange(query + NEAR)
        expected = (keys <= query) & (keys // size == query // size)
        if row is None or not torch.equal(row, expected):
            return None
    return Causal() & AttentionChunks(size)


def _row(mask_function: Callable[..., Any], query: int) -> Tensor | None:
    zero, keys = torch.tensor(0), torch.arange(query + NEAR)
    try:
        seen = mask_function(zero, zero, torch.tensor(query), keys)
    except IndexError:
        # It looks tokens up in a table, so the function alone does not define the mask.
        return None
    return torch.as_tensor(seen).expand(len(keys))


def _agrees(
    mask_function: Callable[..., Any], query: int, left: int | None, right: int | None
) -> bool:
    row, expected = _row(mask_function, query), torch.zeros(query + NEAR, dtype=torch.bool)
    first = 0 if left is None else max(query - left + 1, 0)
    end = len(expected) if right is None else max(query + right + 1, 0)
    expected[first:end] = True
    return row is not None and torch.equal(row, expected)


def _mask(left: int | None, right: int | None) -> Mask | None:
    if left is None:
        masks = {None: Bidirectional(), 0: Causal()}
        return masks.get(right)
    if left < 1 or (right is not None and right < 0):
        return None
    return Causal() & SlidingWindow(left) if right == 0 else SlidingWindow(left, right=right)
