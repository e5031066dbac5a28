"""Blocks of tokens that see each other, as those of an image do: numbered, and as runs."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.arguments import WHOLE_NUMBERS, check_tensor
from dtcp.sequence.neighbours import starts_of_equal
from dtcp.sequence.partition import Ints, stops_of, unique_ascending

VISION = (1, 2)
"""Token types of images and videos, as transformers' processors give them."""


def split_block(row: int) -> ValueError:
    """The error for a block in several runs, which would be as many intervals."""
    return ValueError(
        f"BlockBidirectional takes blocks of consecutive tokens, got a block id in several runs "
        f"of row {row}: give each run an id of its own."
    )


def vision_blocks(mm_token_type_ids: Tensor) -> Tensor:
    """Number the runs of image and video tokens, from 0 in every row: [B, S], -1 for the rest.

    Whole rows are numbered, before sharding: each shard would start at 0 again.

    Args:
        mm_token_type_ids: [B, S], 1 for an image token, 2 for a video token, as transformers'
            processors give them; audio and text are in no block.
    """
    _check_types(mm_token_type_ids)
    vision = (mm_token_type_ids == VISION[0]) | (mm_token_type_ids == VISION[1])
    starts = vision.clone()
    starts[:, 1:] &= ~vision[:, :-1]
    return torch.where(vision, starts.cumsum(1) - 1, -1)


def _check_types(mm_token_type_ids: Tensor) -> None:
    """Refuse anything but a type per token, [B, S]."""
    kinds = {"mm_token_type_ids": mm_token_type_ids}
    check_tensor("Blocks of images", shape="[B, S]", ndim=2, dtypes=WHOLE_NUMBERS, **kinds)


class TokenTypes:
    """The types of the tokens of whole rows, read as runs: in one pass, on first use.

    Args:
        types: mm_token_type_ids, [B, S], on the host.
    """

    def __init__(self, types: Tensor) -> None:
        _check_types(types)
        self.types = types

    @cached_property
    def starts(self) -> list[Ints]:
        """Where each run of one type starts, row by row; the first token of a row included."""
        return [starts_of_equal(row.numpy()) for row in self.types]

    def row(self, row: int) -> "TokenTypes":
        """The types of one row."""
        only = TokenTypes(self.types[row : row + 1])
        only.starts = self.starts[row : row + 1]
        return only

    def runs(self) -> list[tuple[int, ...]]:
        """All that the types of each row say: where runs start, and then their types."""
        pairs = zip(self.starts, self.types, strict=True)
        return [(*start.tolist(), *types.numpy()[start].tolist()) for start, types in pairs]


class BlockRuns(NamedTuple):
    """Neighbouring tokens of one block and one document, from left to right. Each field [K]."""

    start: Ints
    stop: Ints

    @classmethod
    def of_blocks(cls, block: Tensor, bounds: Ints, *, row: int) -> "BlockRuns":
        """Read off the block of each token of a row, [S], negative for none.

        Args:
            bounds: where documents start, and where the last one ends.
        Raises:
            ValueError: a block in several runs of a document: two runs would be two intervals.
        """
        start = starts_of_equal(block.numpy())
        stop, number = stops_of(start, len(block)), block.numpy()[start]
        runs, of = cls(start[number >= 0], stop[number >= 0])._cut(bounds)
        document = np.searchsorted(bounds, runs.start, side="right") - 1
        pairs = np.stack((document, number[number >= 0][of]), axis=1)
        if len(np.unique(pairs, axis=0)) != len(pairs):
            raise split_block(row)
        return runs

    @classmethod
    def of_images(cls, types: TokenTypes, bounds: Ints, *, row: int) -> "BlockRuns":
        """The blocks of a row that `vision_blocks` numbers."""
        start, numbers = types.starts[row], types.types[row].numpy()
        stop = stops_of(start, len(numbers))
        kind = numbers[start]
        vision = (kind == VISION[0]) | (kind == VISION[1])
        before, after = np.zeros_like(vision), np.zeros_like(vision)
        before[1:], after[:-1] = vision[:-1], vision[1:]
        runs, _ = cls(start[vision & ~before], stop[vision & ~after])._cut(bounds)
        return runs

    def ends_at(self, tokens: Ints) -> tuple[Ints, Ints]:
        """The first and the last token of the run that each token is in; 0 and -1 for none."""
        if not len(self.start):
            return np.zeros_like(tokens), np.full_like(tokens, -1)
        run = np.searchsorted(self.start, tokens, side="right") - 1
        inside = (run >= 0) & (tokens < self.stop[run])
        return np.where(inside, self.start[run], 0), np.where(inside, self.stop[run] - 1, -1)

    def _cut(self, bounds: Ints) -> tuple["BlockRuns", Ints]:
        """Cut where documents end, padding left out; and which run each part comes from."""
        if not len(self.start):
            return self, self.start
        within = bounds[(bounds > self.start[0]) & (bounds < self.stop[-1])]
        start: Ints = unique_ascending(np.append(self.start, within))
        run = np.searchsorted(self.start, start, side="right") - 1
        stop = np.minimum(stops_of(start, int(self.stop[-1])), self.stop[run])
        inside = (start < stop) & (start < bounds[-1])
        return BlockRuns(start[inside], stop[inside]), run[inside]
