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
step leaves. Nothing here depends on which mask, layout or strategy it was. Queries are given as
runs and so are keys: the work grows with their number, not with tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtcp.kernels.softmax.block_ranges import UNUSED, KeyLine
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.neighbours import starts_of_equal
from dtcp.sequence.partition import Ints, expand, stops_of, unique_ascending
from dtcp.sequence.slot_runs import SlotRuns

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


_WIDTH = len(Piece._fields)


def no_pieces() -> Tensor:
    """The table of a mask that was not looked at: kernels that take any interval serve it."""
    return torch.zeros(0, _WIDTH, dtype=torch.int64)


def find_pieces(
    first_key: Tensor, last_key: Tensor, key_token_index: Tensor, *, tiles: int
) -> Tensor:
    """`pieces_of_parts` of intervals that are given token by token, and one part of keys.

    Args:
        first_key, last_key: [B, L], the interval of token indices that each query sees.
        key_token_index: [K], ascending, then UNUSED where a buffer is longer than its keys.
    """
    keys = key_token_index[key_token_index != UNUSED].numpy().astype(np.int64)
    rows = [SlotRuns.whole(runs) for runs in KeyIntervals.read_off(first_key, last_key).runs]
    return pieces_of_parts(rows, KeyLine.of_tokens(keys), tiles=tiles)[0]


def pieces_of_parts(rows: Sequence[SlotRuns], keys: KeyLine, *, tiles: int) -> Tensor:
    """Cut the queries into pieces, for the keys of each part by themselves: once per batch.

    Args:
        rows: what the queries of each row see.
        tiles: pieces that the table has room for, at least MOST_PIECES; so its shape does not
            change from batch to batch.
    Returns:
        [parts, max(tiles, MOST_PIECES), 9] int64 on the host, for `read_pieces`. Where a mask has
        more pieces than that, it says so, and is no longer a plain one.
    """
    pieces = _table(_lines(rows, keys), len(rows))
    of_row = [pieces[pieces[:, 0] == row] for row in range(len(rows))]
    if all(np.array_equal(each[:, 1:], of_row[0][:, 1:]) for each in of_row[1:]):
        pieces = of_row[0]
        pieces[:, 0] = EVERY_ROW
    part = pieces[:, -1]
    room, count = max(tiles, MOST_PIECES), np.bincount(part, minlength=keys.parts)
    table = np.zeros((keys.parts, room, _WIDTH), dtype=np.int64)
    place = np.arange(len(part)) - (count.cumsum() - count)[part]
    fits = count[part] <= room
    table[part[fits], place[fits]] = pieces[fits, :-1]
    table[count > room, 0, 0] = count[count > room]
    return torch.from_numpy(table)


def without_room(table: Tensor) -> Tensor:
    """A table's rows that say something: each attention hashes them, and they are remembered."""
    return table[: max(1, int(table[:, 2].count_nonzero()))]


def read_pieces(table: Tensor) -> list[Piece] | None:
    """The pieces of a table; None if the mask is not a plain one."""
    rows = table.tolist()
    if not rows or (rows[0][0] > 0 and rows[0][2] == 0):
        return None
    return [Piece(*row) for row in rows if row[2]]


class _Lines(NamedTuple):
    """Neighbouring queries of a row, and the keys of a part that they see, some of them at least.

    Counted among the keys of the part; along the queries either end stands still or moves on by a
    key. By part, row and query; each field [R].
    """

    group: Ints  # part * rows + row
    query: Ints
    length: Ints
    begin: Ints
    begin_step: Ints
    stop: Ints
    stop_step: Ints

    def at(self, place: Ints) -> "_Lines":
        """Each query at these places, where all of them are lined up."""
        before = self.length.cumsum() - self.length
        line = before.searchsorted(place, side="right") - 1
        group, query, _, begin, begin_step, stop, stop_step = (x[line] for x in self)
        after = place - before[line]
        begin, stop = begin + begin_step * after, stop + stop_step * after
        return _Lines(group, query + after, 0 * after + 1, begin, begin_step, stop, stop_step)


def _lines(rows: Sequence[SlotRuns], keys: KeyLine) -> _Lines:
    """All that any query sees of any part, cut where keys are missing between others."""
    row = np.arange(len(rows)).repeat([len(each.slot) for each in rows])
    columns = zip(*(vars(each).values() for each in rows), strict=True)
    slot, length, first, first_step, last, last_step = (np.concatenate(x) for x in columns)
    parts = unique_ascending(keys.part)
    most = last + last_step * (length - 1)
    before = keys.before(parts[:, None, None], np.array((first, most + 1)))
    some = before[:, 0] < before[:, 1]
    part, run = (some & (last >= first)).nonzero()
    part = parts[part]
    row, slot, length, first, first_step, last, last_step = (
        x[run] for x in (row, slot, length, first, first_step, last, last_step)
    )
    pair, after = _cuts(keys, part, length, (first, first_step), (last + 1, last_step))
    end = stops_of(after, 0)
    end[stops_of(starts_of_equal(pair), len(pair)) - 1] = length
    part, row, slot, first, first_step, last, last_step = (
        x[pair] for x in (part, row, slot, first, first_step, last, last_step)
    )
    first, last = first + first_step * after, last + last_step * after
    ends = first, last + 1, first + first_step, last + 1 + last_step
    begin, stop, begin_step, stop_step = keys.before(part, np.array(ends))
    begin_step, stop_step = begin_step - begin, stop_step - stop
    # Where one end meets the other, queries before or behind it see nothing.
    seen, length = stop - begin, end - after
    skipped = np.where(seen == 0, np.where(stop_step > begin_step, 1, length), 0)
    kept = np.where(stop_step < begin_step, np.minimum(length, seen), length) - skipped
    ends = (begin + begin_step * skipped, begin_step, stop + stop_step * skipped, stop_step)
    lines = _Lines(part * len(rows) + row, slot + after + skipped, kept, *ends)
    return _Lines(*(x[kept > 0] for x in lines))


def _cuts(keys: KeyLine, part: Ints, length: Ints, *ends: tuple[Ints, Ints]) -> tuple[Ints, Ints]:
    """Where an end of what queries see enters or leaves a run of keys: pairs, and queries of each.

    Args:
        part, length: of each pair of a run of queries and a part of the keys.
        ends: from one token on, moving or not.
    """
    pairs = np.arange(len(part))
    found_pair, found_after = [pairs], [0 * pairs]
    for token, step in ends:
        places = keys.place(part, token)
        low = keys.bounds.searchsorted(places, side="right")
        high = keys.bounds.searchsorted(places + step * (length - 1), side="right")
        pair = pairs.repeat(high - low)
        found_pair.append(pair)
        found_after.append(keys.bounds[expand(low, high - low)] - places[pair])
    longest = int(length.max(initial=0)) + 1
    cut = unique_ascending(np.concatenate(found_pair) * longest + np.concatenate(found_after))
    return cut // longest, cut % longest


def _table(lines: _Lines, rows: int) -> Ints:
    """The fields of every piece, and its part: [pieces, 10]."""
    total = int(lines.length.sum())
    if not total:
        return np.zeros((0, _WIDTH + 1), dtype=np.int64)
    low = np.array([0, *_breaks(lines)], dtype=np.int64)
    high = stops_of(low, total)
    first, last = lines.at(low), lines.at(high - 1)
    # Documents of one token, each a piece that fits a window of any size.
    length = high - low
    diagonal = (last.begin == last.stop - 1) & (last.begin == first.begin + length - 1)
    alone = diagonal & (first.stop == first.begin + 1) & (length > 1) & (length <= MOST_ALONE)
    count = np.where(alone, length, 1)
    after = expand(0 * count, count)
    piece = np.arange(len(count)).repeat(count)
    left, moved = last.stop - 1 - last.begin, last.stop - first.stop
    # The queries after the last step of `stop` stand still.
    still = length - 1 - moved
    windows = (
        np.where(alone, 0, left),
        np.where(alone | (last.begin == first.begin), UNLIMITED, left),
        np.where(alone, 0, still),
        np.where(alone | (moved == 0), UNLIMITED, still),
    )
    part, row = first.group // rows, first.group % rows
    q_stop, k_stop = (
        np.where(alone, begin + 1, end)
        for begin, end in ((first.query, last.query + 1), (first.begin, last.stop))
    )
    spans = (first.query, q_stop, first.begin, k_stop)
    moved_on = np.where(alone[piece], after, 0)
    q_start, q_stop, k_start, k_stop = (x[piece] + moved_on for x in spans)
    columns = (row[piece], q_start, q_stop, k_start, k_stop, *(x[piece] for x in windows))
    return np.array((*columns, part[piece])).T


def _breaks(lines: _Lines) -> list[int]:
    """Where another piece starts, in the line of all queries, without the first.

    Cut greedily: a piece goes on as long as its two ends move as they may.
    """
    before, after = _Lines(*(x[:-1] for x in lines)), _Lines(*(x[1:] for x in lines))
    inside = before.length - 1
    ahead = after.begin - before.begin - before.begin_step * inside
    past = after.stop - before.stop - before.stop_step * inside
    joined = (before.group == after.group) & (before.query + before.length == after.query)
    joined &= (ahead >= 0) & (ahead <= 1) & (past >= 0) & (past <= 1)
    # From query to query: inside a line, then to the next one.
    between = np.zeros_like(lines.begin)
    between[:-1] = np.where(joined, 2 * ahead + past, -1)
    values = np.array((2 * lines.begin_step + lines.stop_step, between)).T
    counts = np.array((lines.length - 1, np.ones_like(lines.length))).T
    breaks: list[int] = []
    gap, start, moved, stood = 0, 0, False, False
    pairs = zip(values.flatten()[:-1].tolist(), counts.flatten()[:-1].tolist(), strict=True)
    for value, count in pairs:
        if value == -1:
            breaks.append(gap + 1)
            start, moved, stood = gap + 1, False, False
        elif count:
            # Once `begin` has moved on it may not stand still, nor may `stop` move on again.
            if (moved and value < 2) or (stood and value % 2):
                if gap > start:
                    breaks.append(gap)
                start, moved, stood = gap, False, False
            moved, stood = moved or value >= 2, stood or value % 2 == 0
        gap += count
    return breaks
