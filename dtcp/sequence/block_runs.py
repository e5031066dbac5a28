"""Blocks of tokens that see each other, as those of an image do: numbered, and as runs."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.arguments import WHOLE_NUMBERS, check_tensor
from dtcp.sequence.partition import Ints, starts_of_groups, stops_of, unique_ascending

VISION = (1, 2)
"""Token types of images and videos, as transformers' processors give them."""


def vision_blocks(mm_token_type_ids: Tensor) -> Tensor:
    """Number the runs of image and video tokens, from 0 in every row: [B, S], -1 for the rest.

    Whole rows are numbered, before sharding: each shard would start at 0 again.

    Args:
        mm_token_type_ids: [B, S], 1 for an image token, 2 for a video token, as transformers'
            processors give them; audio and text are in no block.
    """
    check_types(mm_token_type_ids)
    vision = (mm_token_type_ids == VISION[0]) | (mm_token_type_ids == VISION[1])
    starts = vision.clone()
    starts[:, 1:] &= ~vision[:, :-1]
    return torch.where(vision, starts.cumsum(1) - 1, -1)


def check_types(mm_token_type_ids: Tensor) -> None:
    """Refuse what is no type of each token, [B, S]."""
    kinds = {"mm_token_type_ids": mm_token_type_ids}
    check_tensor("Blocks of images", shape="[B, S]", ndim=2, dtypes=WHOLE_NUMBERS, **kinds)


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
        start = _changes(block)
        stop, number = stops_of(start, len(block)), block.numpy()[start]
        runs, of = cls(start[number >= 0], stop[number >= 0])._cut(bounds)
        document = np.searchsorted(bounds, runs.start, side="right") - 1
        pairs = np.stack((document, number[number >= 0][of]), axis=1)
        if len(np.unique(pairs, axis=0)) != len(pairs):
            raise ValueError(
                f"BlockBidirectional takes blocks of consecutive tokens, got a block id in "
                f"several runs of row {row}: give each run an id of its own."
            )
        return runs

    @classmethod
    def of_images(cls, mm_token_type_ids: Tensor, bounds: Ints) -> "BlockRuns":
        """Those of `vision_blocks` of a row, [S], in one pass over it."""
        start = _changes(mm_token_type_ids)
        stop = stops_of(start, len(mm_token_type_ids))
        vision = np.isin(mm_token_type_ids.numpy()[start], VISION)
        before, after = np.append(False, vision[:-1]), np.append(vision[1:], False)
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
        """Cut where documents end, and without padding; and the run that each comes from."""
        if not len(self.start):
            return self, self.start
        within = bounds[(bounds > self.start[0]) & (bounds < self.stop[-1])]
        start: Ints = unique_ascending(np.append(self.start, within))
        run = np.searchsorted(self.start, start, side="right") - 1
        stop = np.minimum(stops_of(start, int(self.stop[-1])), self.stop[run])
        inside = (start < stop) & (start < bounds[-1])
        return BlockRuns(start[inside], stop[inside]), run[inside]


def _changes(numbers: Tensor) -> Ints:
    """Where a token has another number than the one before it, the first token among them."""
    return starts_of_groups(numbers.numpy())
