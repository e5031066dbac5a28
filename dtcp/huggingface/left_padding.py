"""Moves left padding, as of prompts before completions, to the right, and results back.

A policy trainer aligns the ends of a batch's prompts, so that all completions lie in the same
columns. A mesh computes rows that start at 0.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def left_padding(rows: Mapping[str, Any]) -> Tensor | None:
    """How many tokens each row is padded by on the left, [B] on the host; None if none is."""
    mask = rows.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not len(mask):
        return None
    padding = mask.bool().int().argmax(1)
    return padding if padding.any() else None


def moved_to_right(
    rows: Mapping[str, Any], padding: Tensor, *, as_long: bool = False
) -> dict[str, Any]:
    """The rows with that padding at their ends, cut to the longest of them.

    Args:
        rows: attention_mask [B, S]; everything else of shape [B, S] moves along.
        padding: from left_padding.
        as_long: do not cut rows.
    """
    mask = rows["attention_mask"]
    columns = torch.arange(mask.shape[1]) + padding[:, None]
    index = columns % mask.shape[1]
    filled = (mask.gather(1, index) != 0).any(0).nonzero()
    length = mask.shape[1] if as_long else int(filled.max()) + 1
    return {
        key: x.gather(1, index[:, :length].to(x.device)) if _is_of_tokens(x, mask) else x
        for key, x in rows.items()
    }


def moved_back(numbers: Mapping[str, Tensor], padding: Tensor, length: int) -> dict[str, Tensor]:
    """Numbers per token, moved back to where the rows had the tokens; 0 elsewhere.

    Args:
        numbers: [B, s] each, of rows as they were computed.
        length: tokens of each row as it was given, S.
    Returns:
        [B, length] each, with their gradients.
    """
    columns = torch.arange(length) - padding[:, None]
    return {key: _picked(x, columns.to(x.device)) for key, x in numbers.items()}


def _picked(x: Tensor, columns: Tensor) -> Tensor:
    there = (columns >= 0) & (columns < x.shape[1])
    return x.gather(1, columns.clamp(0, x.shape[1] - 1)).where(there, x.new_zeros(()))


def _is_of_tokens(x: Any, mask: Tensor) -> bool:
    return isinstance(x, Tensor) and x.shape == mask.shape
