"""The mask of some queries over some keys as pieces of plain attention, found on the host.

Kernels of other people are fastest where a mask is plain: every query sees every key, or is causal,
or has a window. Each query here sees one range of keys, and along neighbouring queries the two
ends of the range mostly stand still or move on by one key. Such a run is a piece:

    begin stands still, then moves on          stop moves on, then stands still

          k_start        k_stop
    q_start  # # . . . .                      of the last query, k_stop - 1 is its diagonal: it sees
             # # # . . .                      `left` keys to the left of it and, once the range
             . # # # . .                      stands still, `right` to the right of it
             . . # # # .

which is what flash attention calls a sequence, its diagonal in the bottom right corner. A causal
document is one piece, so is a window over a document with its halo, or a rectangle that a ring's
step leaves. Nothing here depends on which mask, layout or strategy it was.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.softmax.block_ranges import UNUSED

UNLIMITED = 1 << 40
"""A bound of a window that no sequence reaches."""
MOST_PIECES = 64
"""Pieces that a table has room for, where it has fewer tiles of queries."""
MOST_ALONE = 8
"""Neighbouring tokens that see themselves only, up to which they are taken for documents."""
EVERY_ROW = -1
"""Stands for the row of a piece that is the same in all rows."""


class Piece(NamedTuple):
    """Queries and keys of one sequence, and the windows under which each query sees its keys."""

    row: int  # of the batch, or EVERY_ROW
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    least_left: int  # any window from the least to the most gives the same keys
    most_left: int
    least_right: int
    most_right: int


ANY_WINDOW = (0, UNLIMITED, 0, UNLIMITED)
_WIDTH = len(Piece._fields)


def no_pieces() -> Tensor:
    """The table of a mask that was not looked at: kernels that take any interval serve it."""
    return torch.zeros(0, _WIDTH, dtype=torch.int64)


def find_pieces(
    first_key: Tensor, last_key: Tensor, key_token_index: Tensor, *, tiles: int
) -> Tensor:
    """Cut the queries into pieces: once per batch, in one pass and a step per piece.

    Args:
        first_key, last_key: [B, L], the interval of token indices that each query sees.
        key_token_index: [K], ascending, then UNUSED where a buffer is longer than its keys.
        tiles: pieces that the table has room for, at least MOST_PIECES; so its shape does not
            change from batch to batch.
    Returns:
        [max(tiles, MOST_PIECES), 9] int64 on the host, for `read_pieces`. Where a mask has more
        pieces than that, it says so, and is no longer a plain one.
    """
    keys = key_token_index[key_token_index != UNUSED].contiguous()
    alike = bool((first_key == first_key[:1]).all()) and bool((last_key == last_key[:1]).all())
    pieces: list[Piece] = []
    for row in range(1 if alike else first_key.shape[0]):
        first, last = (x[row].to(torch.int64).contiguous() for x in (first_key, last_key))
        begin = torch.searchsorted(keys, first)
        stop = torch.searchsorted(keys, last, right=True)
        begin, stop = _nothing_as_zero(begin, stop, first <= last)
        pieces += _pieces_of_row(EVERY_ROW if alike else row, begin, stop)
    table = torch.zeros(max(tiles, MOST_PIECES), _WIDTH, dtype=torch.int64)
    if len(pieces) > len(table):
        table[0, 0] = len(pieces)
        return table
    if pieces:
        table[: len(pieces)] = torch.tensor(pieces)
    return table


def read_pieces(table: Tensor) -> list[Piece] | None:
    """The pieces of a table; None if the mask is not a plain one."""
    rows = table.tolist()
    if not rows or (rows[0][0] > 0 and rows[0][2] == 0):
        return None
    return [Piece(*row) for row in rows if row[2]]


def _nothing_as_zero(begin: Tensor, stop: Tensor, sees: Tensor) -> tuple[Tensor, Tensor]:
    """Both 0 for a query that sees none of the keys."""
    sees = sees & (begin < stop)
    return torch.where(sees, begin, 0), torch.where(sees, stop, 0)


def _pieces_of_row(row: int, begin: Tensor, stop: Tensor) -> list[Piece]:
    """Cut greedily: a piece goes on as long as its two ends move as they may."""
    ends = _breaks(begin, stop)
    pieces = []
    for low, high in zip([0, *ends], [*ends, len(begin)], strict=True):
        k_start, k_stop = int(begin[low]), int(stop[high - 1])
        diagonal = int(begin[high - 1]) == k_stop - 1 == k_start + high - 1 - low
        if diagonal and int(stop[low]) == k_start + 1 and 1 < high - low <= MOST_ALONE:
            # Documents of one token, each a piece that fits a window of any size.
            pieces += [
                Piece(row, low + i, low + i + 1, k_start + i, k_start + i + 1, *ANY_WINDOW)
                for i in range(high - low)
            ]
        elif k_stop:
            steps = begin[low:high].diff(), stop[low:high].diff()
            pieces.append(_piece(row, (low, high), (k_start, k_stop), int(begin[high - 1]), *steps))
    return pieces


def _piece(
    row: int,
    queries: tuple[int, int],
    keys: tuple[int, int],
    last_begin: int,
    begin_steps: Tensor,
    stop_steps: Tensor,
) -> Piece:
    (low, high), (k_start, k_stop) = queries, keys
    left = k_stop - 1 - last_begin
    moves_left, moves_right = bool(begin_steps.any()), bool(stop_steps.any())
    # The queries after the last step of `stop` stand still.
    still = int((stop_steps.flip(0).cumsum(0) == 0).sum())
    return Piece(
        row,
        low,
        high,
        k_start,
        k_stop,
        left,
        left if moves_left else UNLIMITED,
        still if moves_right else high - low - 1,
        still if moves_right else UNLIMITED,
    )


def _breaks(begin: Tensor, stop: Tensor) -> list[int]:
    """Queries that start another piece, without the first."""
    ahead, past = begin.diff(), stop.diff()
    sees = stop > 0
    joined = (sees[1:] == sees[:-1]) & (ahead >= 0) & (ahead <= 1) & (past >= 0) & (past <= 1)
    state = torch.where(joined, 2 * ahead + past, -1)
    values, counts = state.unique_consecutive(return_counts=True)
    breaks: list[int] = []
    gap, start, moved, stood = 0, 0, False, False
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if value == -1:
            # Every gap of these parts two pieces.
            breaks += range(gap + 1, gap + count + 1)
            start, moved, stood = gap + count, False, False
        else:
            # Once `begin` has moved on it may not stand still, nor may `stop` move on again.
            if (moved and value < 2) or (stood and value % 2):
                if gap > start:
                    breaks.append(gap)
                start, moved, stood = gap, False, False
            moved, stood = moved or value >= 2, stood or value % 2 == 0
        gap += count
    return breaks
