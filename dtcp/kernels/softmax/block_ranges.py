"""Which keys each tile of queries sees, worked out on the host once per batch.

Every mask is one interval of token indices per query (dtcp/sequence/masks.py), and keys are in
ascending order. So a tile of neighbouring queries sees one range of keys, and an inner part of it
is seen by every query of the tile; in FlexAttention's words, full blocks between partial ones:

    key_start      full_start            full_stop       key_stop
        |  partial     |         full          |  partial    |

Only the partial ends need a mask, and keys outside the range are never read. The table has one
row per tile of queries, never one entry per pair of tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.arguments import WHOLE_NUMBERS, check_ints, check_tensor
from dtcp.sequence.key_intervals import check_intervals
from dtcp.sequence.partition import Ints, unique_ascending
from dtcp.sequence.slot_runs import SlotRuns, Tiles

TILE = 128
UNUSED = -1  # the token index of a slot that holds no key


def block_ranges(
    first_key: Tensor, last_key: Tensor, key_token_index: Tensor, *, tile: int = TILE
) -> Tensor:
    """The range of keys that each tile of queries sees, and the full part of it.

    Args:
        first_key, last_key: [B, L], the interval of token indices that each query sees.
        key_token_index: [K], ascending, then UNUSED where a buffer is longer than its keys.
        tile: queries per tile.
    Returns:
        [B, ceil(L / tile), 6] int64 on the host: q_start, q_stop, key_start, full_start,
        full_stop, key_stop, which count this rank's queries and these keys.
    Raises:
        TypeError, ValueError: what is no interval per query, or token indices of keys that
            repeat, descend or follow UNUSED.
    """
    check_ints("A tile of queries", least=1, tile=tile)
    check_intervals(first_key, last_key)
    name = {"key_token_index": key_token_index}
    check_tensor("A tile of queries", shape="[K]", ndim=1, dtypes=WHOLE_NUMBERS, **name)
    used = key_token_index != UNUSED
    keys = key_token_index[used].contiguous()
    if bool((keys.diff() <= 0).any()) or not bool(used[: len(keys)].all()):
        raise ValueError(
            "Keys are lined up by ascending token index and then UNUSED, got indices that descend, "
            "repeat or follow UNUSED: use a layout whose shards ascend."
        )
    return _ranges(_tiles(first_key, last_key, tile), keys.numpy().searchsorted)


@dataclass(frozen=True, eq=False)
class KeyLine:
    """Keys lined up in parts, each by ascending token index, as runs of tokens. Each field [R]."""

    part: Ints
    start: Ints
    stop: Ints
    parts: int

    @classmethod
    def of_tokens(cls, tokens: Ints) -> "KeyLine":
        """Of one part, from the token index of each key, [K] ascending."""
        first = np.append(True, np.diff(tokens) != 1)[: len(tokens)].nonzero()[0]
        last = np.append(first[1:], len(tokens))[: len(first)] - 1
        return cls(0 * first, tokens[first], tokens[last] + 1, 1)

    def before(self, part: Ints, token: Ints) -> Ints:
        """How many keys of a part come before a token; both of one shape, or broadcast to it."""
        line, places = self._line, self.place(part, token)
        # Among all keys; of the parts before this one none is missing.
        run = line.searchsorted(places, side="right") - 1
        some = np.minimum(places - line[run], self._length[run])
        count: Ints = self._total[run] + some - self._of_part[part]
        return count

    def place(self, part: Ints, token: Ints) -> Ints:
        """Where tokens of a part lie on a line of all parts."""
        place: Ints = part * self._width + np.minimum(token, self._width - 1)
        return place

    @cached_property
    def bounds(self) -> Ints:
        """Where runs of keys start and end on that line: [2 R]."""
        ends = np.array((self.start, self.stop)) + self.part * self._width
        return ends.T.flatten()

    # What follows starts with a run of no keys, before all others.

    @cached_property
    def _width(self) -> int:
        return int(self.stop.max(initial=0)) + 2

    @cached_property
    def _line(self) -> Ints:
        return np.concatenate(([-1], self.part * self._width + self.start))

    @cached_property
    def _length(self) -> Ints:
        return np.concatenate(([0], self.stop - self.start))

    @cached_property
    def _total(self) -> Ints:
        """Keys of all parts before each run."""
        return self._length.cumsum() - self._length

    @cached_property
    def _of_part(self) -> Ints:
        """Keys before each part."""
        return self._length.cumsum()[self.part.searchsorted(np.arange(self.parts))]


def block_ranges_of_parts(rows: Sequence[SlotRuns], keys: KeyLine, *, tile: int = TILE) -> Tensor:
    """`block_ranges` of rows of queries for keys in several parts, from runs.

    Tiles are cut where neighbouring queries see far more keys together than each by itself.

    Returns:
        [parts, B, tiles, 6] int64; the last tiles may be empty.
    """
    by_row = [row.tiles(tile) for row in rows]
    bounds, all_see = (
        np.stack(x) for x in zip(*((t.bounds, t.all_see) for t in by_row), strict=True)
    )
    ends = np.stack([tiles.ends for tiles in by_row], axis=1)
    # Of many ranks, most have no key that is needed here.
    parts = unique_ascending(keys.part)

    def before(tokens: Ints) -> Ints:
        return keys.before(parts.reshape(-1, 1, 1, 1), tokens).swapaxes(0, 1)

    of_parts = _ranges(Tiles(bounds, ends, all_see), before)
    if len(parts) == keys.parts:
        return of_parts
    ranges = torch.zeros(keys.parts, *of_parts.shape[1:], dtype=torch.int64)
    ranges[..., 0], ranges[..., 1] = (torch.from_numpy(x) for x in (bounds[:, :-1], bounds[:, 1:]))
    return ranges.index_copy_(0, torch.from_numpy(parts), of_parts)


def _tiles(first_key: Tensor, last_key: Tensor, tile: int) -> Tiles:
    """Of rows of queries that are given one by one: as of `SlotRuns`, with B before tiles."""
    length = first_key.shape[1]
    tiles = -(-length // tile)
    first, last = (_tiled(x.to(torch.int64), tiles, tile) for x in (first_key, last_key))
    real = (torch.arange(tiles * tile) < length).view(tiles, tile)
    blind, beyond = (last < first) | ~real, torch.iinfo(torch.int64).max
    ends = (
        first.masked_fill(blind, beyond).amin(-1),
        last.masked_fill(blind, -1).amax(-1) + 1,
        first.masked_fill(~real, -1).amax(-1),
        last.masked_fill(~real, beyond).amin(-1) + 1,
    )
    bounds = np.minimum(np.arange(tiles + 1) * tile, length)
    return Tiles(bounds, torch.stack(ends).numpy(), (~(blind & real).any(-1)).numpy())


def _ranges(tiles: Tiles, before: Callable[[Ints], Ints]) -> Tensor:
    """From how many keys come before a token: [B, tiles, 6], with a dim before it if that has.

    Args:
        before: of tokens [4, B, tiles].
    """
    key_start, key_stop, full_start, full_stop = before(tiles.ends)
    full = tiles.all_see & (full_start < full_stop)
    ranges = np.empty((*key_start.shape, 6), dtype=np.int64)
    ranges[..., 0], ranges[..., 1] = tiles.bounds[..., :-1], tiles.bounds[..., 1:]
    ranges[..., 2] = key_start
    ranges[..., 3] = np.where(full, full_start, key_start)
    ranges[..., 4] = np.where(full, full_stop, key_start)
    ranges[..., 5] = np.maximum(key_stop, key_start)
    return torch.from_numpy(ranges)


def _tiled(x: Tensor, tiles: int, tile: int) -> Tensor:
    """[B, L] -> [B, tiles, tile]; -1 in place of the queries that the last tile lacks."""
    rest = tiles * tile - x.shape[1]
    return torch.nn.functional.pad(x, (0, rest), value=-1).view(x.shape[0], tiles, tile)
