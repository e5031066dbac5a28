"""Masks as runs of tokens: found from documents and blocks, not from every token.

Inside a document the first and the last key that a token sees stand still or move on with it, and
which of the two changes only in a few places: where a window is full, where a prefix ends. So a
mask is a short list of runs (of several intervals, one for each), and what follows from its
intervals follows from the list: the work of tokens, the keys that the tokens of a rank need.

    Causal() & SlidingWindow(3), documents of 5 and 2 tokens
    token       0 1 2 3 4 | 5 6
    first key   0 0 0 1 2 | 5 5        runs 0-2, 2-5, 5-7: it stands, moves, stands
    last key    0 1 2 3 4 | 5 6        it moves
"""

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch

from dtcp.sequence.block_runs import BlockRuns
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import PADDING
from dtcp.sequence.interval_runs import IntervalRuns, combined_runs, read_off_runs, runs_of_ends
from dtcp.sequence.interval_sets import Interval, intersection
from dtcp.sequence.masks import (
    And,
    AttentionChunks,
    Bidirectional,
    BlockBidirectional,
    Causal,
    Mask,
    MemoryDocument,
    Or,
    SlidingWindow,
    ends_of,
    intervals_of,
    token_field,
)
from dtcp.sequence.partition import Ints, expand, stops_of, sums_before, unique_ascending
from dtcp.sequence.prefix_masks import FirstTokens, Prefix, PrefixLM


def interval_runs(mask: Mask, coords: Coords, row: int = 0) -> list[IntervalRuns]:
    """`Mask.intervals` of one whole row as runs, for each of the mask's intervals.

    For this library's masks they follow from the documents and the blocks of images; for a mask
    written elsewhere they are read off the intervals of all tokens.

    Raises:
        ValueError: for some token the mask is more intervals of the row than it says.
    """
    lengths = None if coords.documents is None else coords.documents.lengths[row]
    if lengths is None or not _is_known(mask) or not _is_prefix_of_documents(coords, row):
        return _runs_read_off(mask, coords)[row]
    runs: list[IntervalRuns] | None = coords.memo.get((mask, row))
    if runs is None:
        runs = coords.memo[mask, row] = _known_runs(mask, coords, row, lengths)
    return runs


def _runs_read_off(mask: Mask, coords: Coords) -> list[list[IntervalRuns]]:
    """Those of all rows, of which a mask gives the intervals at once."""
    runs: list[list[IntervalRuns]] | None = coords.memo.get(mask)
    if runs is None:
        first, last = zip(*intervals_of(mask, *_intervals(mask, coords)), strict=True)
        rows = zip(torch.stack(first, 1).numpy(), torch.stack(last, 1).numpy(), strict=True)
        runs = [[read_off_runs(*ends) for ends in zip(*row, strict=True)] for row in rows]
        coords.memo[mask] = runs
    return runs


def _intervals(mask: Mask, coords: Coords) -> Interval:
    """`Mask.intervals`, which a mask may define itself and leave unclipped."""
    first, last = ends_of(mask, mask.intervals(coords), coords)
    beyond = (last >= first) & ((first < coords.start) | (last > coords.end))
    if not isinstance(mask, MemoryDocument) and bool(beyond.any()):
        place = tuple(beyond.nonzero()[0].tolist())
        row, token = place[-2:]
        raise ValueError(
            f"A token sees keys of its own document, got {mask} that gives token {token} of row "
            f"{row} the keys {int(first[place])} to {int(last[place])} in one from "
            f"{int(coords.start[row, token])} to {int(coords.end[row, token])}: name others, or "
            f"leave `intervals` as it is, and define `_interval`."
        )
    return first, last


def _known_runs(
    mask: Mask, coords: Coords, row: int, lengths: tuple[int, ...]
) -> list[IntervalRuns]:
    """Runs of the whole mask if each part sees the token itself, else combined from its sides."""
    if all(part.sees_itself for part in _parts(mask)):
        return [_unbroken_runs(mask, coords, row, lengths)]
    if isinstance(mask, And | Or):
        left, right = (_known_runs(side, coords, row, lengths) for side in (mask.left, mask.right))
        combine = intersection if isinstance(mask, And) else mask.united
        return combined_runs(left, right, combine)
    bounds = sums_before(np.array(lengths, dtype=np.int64))
    if isinstance(mask, FirstTokens):
        return [_runs_of_starts(bounds, mask.size, coords.seq_len)]
    return [_runs_of_starts(bounds, _prefixes(mask, coords, row, bounds), coords.seq_len)]


def _runs_of_starts(bounds: Ints, size: Ints | int, seq_len: int) -> IntervalRuns:
    """One run for each document, whose tokens see its first `size` ones, and one of padding."""
    start = bounds if bounds[-1] < seq_len else bounds[:-1]
    last = np.append(np.minimum(bounds[:-1] + size, bounds[1:]) - 1, -1)[: len(start)]
    empty = last < start
    first, last, still = np.where(empty, 0, start), np.where(empty, -1, last), np.zeros_like(start)
    return IntervalRuns(start, stops_of(start, seq_len), first, still, last, still)


def _unbroken_runs(mask: Mask, coords: Coords, row: int, lengths: tuple[int, ...]) -> IntervalRuns:
    """Runs of a mask that is one interval around each token."""
    seq_len = coords.seq_len
    bounds = sums_before(np.array(lengths, dtype=np.int64))
    with_blocks = any(isinstance(part, BlockBidirectional) for part in _parts(mask))
    blocks = coords.block_runs(row) if with_blocks else None
    if _is_plain(mask) and (blocks is not None or not with_blocks):
        return _plain_runs(mask, bounds, blocks, seq_len)
    starts = _breaks(mask, bounds, _prefixes(mask, coords, row, bounds), blocks, seq_len)
    stops = stops_of(starts, seq_len)
    tokens = np.concatenate((starts, np.minimum(starts + 1, stops - 1)))
    first, last = mask.intervals(_coords_of(tokens, bounds, blocks, coords, row))
    return runs_of_ends(starts, stops, *(x[0].numpy().astype(np.int64) for x in (first, last)))


def _causal_runs(bounds: Ints, seq_len: int) -> IntervalRuns:
    """One run for each document, and one of padding: most masks need no more."""
    start = bounds if bounds[-1] < seq_len else bounds[:-1]
    real = start < bounds[-1]
    first, last, step = np.where(real, start, 0), np.where(real, start, -1), real.astype(np.int64)
    return IntervalRuns(start, stops_of(start, seq_len), first, 0 * step, last, step)


def _is_plain(mask: Mask) -> bool:
    """Whether a mask is what most layers have: causal but for images, and maybe in a window."""
    if type(mask) is And and type(mask.left) is SlidingWindow and mask.left.right is None:
        mask = mask.right
    elif type(mask) is And and type(mask.right) is SlidingWindow and mask.right.right is None:
        mask = mask.left
    sides = {type(mask.left), type(mask.right)} if type(mask) is Or else {type(mask)}
    return Causal in sides and sides <= {Causal, BlockBidirectional}


def _plain_runs(mask: Mask, bounds: Ints, blocks: BlockRuns | None, seq_len: int) -> IntervalRuns:
    """Runs of a plain mask, in a fifth of the time that it takes to find where limits cross."""
    runs = _causal_runs(bounds, seq_len)
    for part in _parts(mask):
        runs = _in_window(runs, part.size) if isinstance(part, SlidingWindow) else runs
    if blocks is None:
        return runs
    # Inside a block the last key is its end.
    start = np.concatenate((runs.start, blocks.start, blocks.stop[blocks.stop < seq_len]))
    start = unique_ascending(start)
    run = runs.start.searchsorted(start, side="right") - 1
    first, last = runs.at(start)
    _, end = blocks.ends_at(start)
    last_step = np.where(end < 0, runs.last_step[run], 0)
    last = np.where(end < 0, last, end)
    return IntervalRuns(
        start, stops_of(start, seq_len), first, runs.first_step[run], last, last_step
    )


def _in_window(causal: IntervalRuns, size: int) -> IntervalRuns:
    """The first key stands still until the window is full, then moves."""
    full = causal.start + size - 1
    moving = ((full < causal.stop) & (causal.last_step > 0)).nonzero()[0]
    kept = np.arange(len(full))
    if size == 1:
        kept = (causal.last_step == 0).nonzero()[0]
    run, start = np.concatenate((kept, moving)), np.concatenate((causal.start[kept], full[moving]))
    order = start.argsort()
    run, start = run[order], start[order]
    return IntervalRuns(
        start,
        stops_of(start, int(causal.stop[-1])),
        causal.first[run],
        (order >= len(kept)).astype(np.int64),
        np.where(causal.last_step[run] > 0, start, -1),
        causal.last_step[run],
    )


def _is_known(mask: Mask) -> bool:
    """Whether breaks are known: by exact type, for a subclass may see otherwise."""
    if type(mask) in (And, Or):
        pair = cast(And, mask)
        return _is_known(pair.left) and _is_known(pair.right)
    return type(mask) in (
        Bidirectional,
        Causal,
        SlidingWindow,
        AttentionChunks,
        PrefixLM,
        BlockBidirectional,
        FirstTokens,
        Prefix,
    )


def _is_prefix_of_documents(coords: Coords, row: int) -> bool:
    """Whether all tokens of a document name the same prefix."""
    if coords.prefix is None:
        return True
    prefix = coords.prefix[row]
    other = (prefix[1:] != prefix[:-1]).nonzero().flatten().numpy() + 1
    assert coords.documents is not None
    borders = np.cumsum(coords.documents.lengths[row])
    return bool(np.isin(other, borders).all()) and int(prefix.min()) >= 0


def _prefixes(mask: Mask, coords: Coords, row: int, bounds: Ints) -> Ints:
    """The prefix of each document; 0 without."""
    if coords.prefix is None:
        if isinstance(mask, Prefix):
            token_field(mask, coords, "prefix")  # which refuses
        return np.zeros(len(bounds) - 1, dtype=np.int64)
    return coords.prefix[row, torch.from_numpy(bounds[:-1])].numpy()


def _parts(mask: Mask) -> Iterator[Mask]:
    """The masks that a mask is made of."""
    if isinstance(mask, And | Or):
        yield from _parts(mask.left)
        yield from _parts(mask.right)
    else:
        yield mask


def _breaks(
    mask: Mask, bounds: Ints, prefixes: Ints, blocks: BlockRuns | None, seq_len: int
) -> Ints:
    """Where runs may start: wherever two limits of one end of an interval cross in a document.

    First keys are limited by the start of document, chunk or block and by the token less a reach,
    last keys by the ends of document, chunk, prefix and block and by the token plus a reach. A
    token sees itself in every mask here but outside of blocks, so no interval vanishes elsewhere.
    """
    parts = [*_parts(mask)]
    windows = [part for part in parts if isinstance(part, SlidingWindow)]
    left = {window.size - 1 for window in windows}
    right = {window.right for window in windows if window.right is not None}
    rest = [0, bounds[-1]] if bounds[-1] < seq_len else [0]
    breaks = [np.array(rest, dtype=np.int64)]
    sizes: set[int | None] = {part.size for part in parts if isinstance(part, AttentionChunks)}
    for size in sizes | {None}:
        starts = bounds[:-1] if size is None else _chunk_starts(bounds, size)
        ends = stops_of(starts, int(bounds[-1]))
        places = [starts + reach for reach in left] + [ends - 1 - reach for reach in right]
        if size is None and prefixes.any():
            places += [starts + prefixes - 1 - reach for reach in right | {0}]
        breaks += [starts, *(x[(x > starts) & (x < ends)] for x in places)]
    if blocks is not None:
        starts, ends = blocks
        places = [starts + reach for reach in left | {0}]
        places += [ends - 1 - reach for reach in right | {0}]
        breaks += [starts, ends[ends < seq_len], *(x[(x > starts) & (x < ends)] for x in places)]
    return unique_ascending(np.concatenate(breaks))


def _chunk_starts(bounds: Ints, size: int) -> Ints:
    """Where the chunks of documents start."""
    count = -(-np.diff(bounds) // size)
    return np.repeat(bounds[:-1], count) + size * expand(np.zeros_like(count), count)


def _coords_of(
    tokens: Ints, bounds: Ints, blocks: BlockRuns | None, coords: Coords, row: int
) -> Coords:
    """The coordinates of some tokens of a row, [1, T], from where its documents start."""
    document = bounds.searchsorted(tokens, side="right") - 1
    padding = document == len(bounds) - 1
    start = np.where(padding, tokens, bounds[document])
    end = np.where(padding, tokens, bounds[np.minimum(document + 1, len(bounds) - 1)] - 1)
    document = np.where(padding, PADDING, document)
    fields = [torch.from_numpy(x)[None] for x in (tokens, document, start, end)]
    prefix = None if coords.prefix is None else coords.prefix[row : row + 1, fields[0][0]]
    ends = None if blocks is None else torch.from_numpy(np.stack(blocks.ends_at(tokens)))[:, None]
    return Coords(fields[0], fields[1], fields[2], fields[3], prefix, block_ends=ends)
