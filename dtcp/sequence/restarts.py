"""Position ids held against documents: where they restart, and whether they count every token."""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcp.sequence.documents import Documents, check_token_positions
from dtcp.sequence.neighbours import places_after
from dtcp.sequence.partition import Ints


def check_restarts(
    documents: Documents,
    position_ids: Tensor,
    padding: Tensor | None,
    *,
    name: str = "documents",
    block: Tensor | None = None,
) -> tuple[bool, ...]:
    """Refuse position ids that restart anywhere but where documents start, or blocks alike.

    Those that count on through every row are right with any documents: RoPE reads differences.

    Args:
        position_ids: [B, S], [1, S], or [axes, B, S], of which the first axis is read.
        padding: [B, S] bool, where position ids mean nothing.
        name: where the documents come from.
        block: [B, S], the number of each token's block. Blocks next to each other may start at
            one position, as answers go on from a prompt.
    Returns:
        of each row, whether they count the tokens of its documents from 0.
    """
    rows, seq_len = documents.batch, documents.seq_len
    check_token_positions(position_ids, rows, seq_len)
    position_ids = position_ids.cpu()
    lines = position_ids[0] if position_ids.ndim == 3 else position_ids
    first = lines.expand(rows, -1)
    # One pass over all tokens; the rest looks at the few that do not count on.
    row, token = places_after(np.less_equal, lines)
    if rows > len(lines):
        row = torch.arange(rows).repeat_interleave(len(token))
        token = token.repeat(rows)
    counted = (False,) * rows
    if position_ids.ndim == 2 and not position_ids.is_floating_point():
        counted = _counted(documents, first.numpy(), (row * seq_len + token).numpy())
    if all(counted):
        return counted
    tokens = _Tokens(documents, padding)
    row, token = tokens.among(*_restarts(position_ids, row, token))
    if not len(row):
        return counted
    starting = [(index, end) for index, x in enumerate(documents.lengths) for end in _inner(x)]
    at_starts = torch.tensor(starting, dtype=torch.int64).view(-1, 2).unbind(1)
    inside = ~torch.isin(row * seq_len + token, at_starts[0] * seq_len + at_starts[1])
    if block is not None and bool(inside.any()):
        inside &= ~_starts_like_last(documents, first, block.cpu(), row, token)
    wrong = row[inside], token[inside], "inside a document"
    if not bool(inside.any()):
        row, token = tokens.among(*at_starts)
        through = first[row, token] - first[row, token - 1] == 1
        wrong = row[through], token[through], "where one starts"
    if not len(wrong[0]):
        return counted
    at, index = int(wrong[0][0]), int(wrong[1][0])
    raise ValueError(
        f"Position ids restart where documents start and nowhere else, got position_ids "
        f"{first[at, index - 1].item()} and then {first[at, index].item()} at token {index} of row "
        f"{at}, {wrong[2]} by {name}: correct one of them, or leave position_ids out."
    )


def _starts_like_last(
    documents: Documents, position_ids: Tensor, block: Tensor, row: Tensor, token: Tensor
) -> Tensor:
    """Which tokens start a block, right behind another one that starts at the same position."""
    runs = torch.stack((documents.document(), block))
    start = torch.arange(documents.seq_len).expand_as(block).clone()
    start[:, 1:].masked_fill_((runs.diff() == 0).all(0), 0)
    last = start.cummax(1).values[row, token - 1]
    touch = (start[row, token] == token) & (block[row, token] >= 0) & (block[row, last] >= 0)
    return touch & (position_ids[row, token] == position_ids[row, last])


def _inner(lengths: Sequence[int]) -> Iterable[int]:
    """Where the documents of a row start, but for the first."""
    return accumulate(lengths[:-1])


class _Tokens:
    """Which tokens, with the one before them, are no padding."""

    def __init__(self, documents: Documents, padding: Tensor | None) -> None:
        self.used = torch.tensor([sum(row) for row in documents.lengths])
        self.padding = padding

    def among(self, row: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the tokens at (row, token); token > 0."""
        kept = token < self.used[row]
        if self.padding is not None:
            kept &= ~self.padding[row, token] & ~self.padding[row, token - 1]
        return row[kept], token[kept]


def _counted(
    documents: Documents, position_ids: NDArray[np.integer], place: Ints
) -> tuple[bool, ...]:
    """Whether the position ids of each row, [B, S], count the tokens of its documents from 0.

    Between two places where they do not ascend, whole numbers count up by one if the last is as far
    from the first as their places are.

    Args:
        place: of tokens where they do not ascend, counted through all rows.
    """
    seq_len, rows = documents.seq_len, range(documents.batch)
    bounds = [np.cumsum([row * seq_len, *documents.lengths[row]]) for row in rows]
    starts, stops = (
        np.concatenate(x) for x in zip(*[(x[:-1], x[1:]) for x in bounds], strict=True)
    )
    used = np.array([x[-1] for x in bounds])
    place = place[place < used[place // seq_len]]
    inner = starts[starts % seq_len > 0]
    first, last = (position_ids[x // seq_len, x % seq_len] for x in (starts, stops - 1))
    other = starts[(first != 0) | (last != stops - 1 - starts)]
    if not np.array_equal(place, inner):
        other = np.append(other, np.setxor1d(place, inner))
    wrong = {*(other // seq_len).tolist()}
    return tuple(row not in wrong for row in rows)


def _restarts(position_ids: Tensor, row: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """(row, token) of the tokens, from the second on, where position ids go back or stay at 0.

    One that repeats another number stands in an image, or in padding. On several axes they place
    images and may go back inside a document: a document starts where all of them are 0.

    Args:
        row, token: where the first axis does not ascend.
    """
    line = row % position_ids.shape[-2]
    before, here = position_ids[..., line, token - 1], position_ids[..., line, token]
    kept = (here == 0).all(0) if position_ids.ndim == 3 else (here < before) | (here == 0)
    return row[kept], token[kept]
