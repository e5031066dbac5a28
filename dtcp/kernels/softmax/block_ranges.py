"""Which keys each tile of queries sees, worked out on the host once per batch.

Every mask is one interval of token indices per query (dtcp/sequence/masks.py), and keys are in
ascending order. So a tile of neighbouring queries sees one range of keys, and an inner part of it
is seen by every query of the tile; in FlexAttention's words, full blocks between partial ones:

    key_start      full_start            full_stop       key_stop
        |  partial     |         full          |  partial    |

Only the partial ends need a mask, and keys outside the range are never read. The table has one
row per tile of queries, never one entry per pair of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.arguments import WHOLE_NUMBERS, check_ints, check_tensor
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.partition import Ints, joined_neighbours, unique_ascending
from dtcp.sequence.slot_runs import SlotRuns

TILE = 128
UNUSED = -1  # the token index of a slot that holds no key


def block_ranges(
    first_key: Tensor, last_key: Tensor, key_token_index: Tensor, *, tile: int = TILE
) -> Tensor:
    """`block_ranges_of_parts` of intervals that are given token by token, and one part of keys.

    Args:
        first_key, last_key: [B, L], the interval of token indices that each query sees.
        key_token_index: [K], ascending, then UNUSED where a buffer is longer than its keys.
    Returns:
        [B, tiles, 6] int64 on the host.
    Raises:
        TypeError, ValueError: what is no interval per query, or token indices of keys that
            repeat, descend or follow UNUSED.
    """
    check_ints("A tile of queries", least=1, tile=tile)
    rows = [SlotRuns.whole(runs) for runs in KeyIntervals.read_off(first_key, last_key).runs]
    name = {"key_token_index": key_token_index}
    check_tensor("A tile of queries", shape="[K]", ndim=1, dtypes=WHOLE_NUMBERS, **name)
    used = key_token_index != UNUSED
    keys = key_token_index[used].to(torch.int64)
    if bool((keys.diff() <= 0).any()) or not bool(used[: len(keys)].all()):
        raise ValueError(
            "Keys are lined up by ascending token index and then UNUSED, got indices that descend, "
            "repeat or follow UNUSED: use a layout whose shards ascend."
        )
    return block_ranges_of_parts(rows, KeyLine.of_tokens(keys.numpy()), tile=tile)[0]


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
        start, stop = joined_neighbours(tokens, tokens + 1)
        return cls(0 * start, start, stop, 1)

    def before(self, part: Ints, token: Ints) -> Ints:
        """How many keys of a part come before a token; both of one shape, or broadcast to it."""
        line, places = self._line, self.place(part, token)
        # Among all keys; of the parts before this one none is missing.
        run = line.searchsorted(places, side="right") - 1
        some = np.minimum(places - line[run], self._length[run])
        return self._total[run] + some - self._of_part[part]

    def place(self, part: Ints, token: Ints) -> Ints:
        """Where tokens of a part lie on a line of all parts."""
        return part * self._width + np.minimum(token, self._width - 1)

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
    """The range of keys that each tile of queries sees, and the full part of it.

    Tiles are cut where neighbouring queries see far more keys together than each by itself.

    Args:
        rows: what the queries of each row see.
        keys: in several parts, each of which is looked at by itself.
        tile: queries per tile, at most.
    Returns:
        [parts, B, tiles, 6] int64 on the host: q_start, q_stop, key_start, full_start, full_stop,
        key_stop, which count this rank's queries and the keys of a part; the last tiles may be
        empty.
    """
    by_row = [row.tiles(tile) for row in rows]
    bounds, all_see = (
        np.stack(x) for x in zip(*((t.bounds, t.all_see) for t in by_row), strict=True)
    )
    ends = np.stack([tiles.ends for tiles in by_row], axis=1)
    # Of many ranks, most have no key that is needed here.
    parts = unique_ascending(keys.part)
    before = keys.before(parts.reshape(-1, 1, 1, 1), ends)
    key_start, key_stop, full_start, full_stop = before.swapaxes(0, 1)
    full = all_see & (full_start < full_stop)
    of_parts = np.empty((*key_start.shape, 6), dtype=np.int64)
    of_parts[..., 0], of_parts[..., 1] = bounds[:, :-1], bounds[:, 1:]
    of_parts[..., 2] = key_start
    of_parts[..., 3] = np.where(full, full_start, key_start)
    of_parts[..., 4] = np.where(full, full_stop, key_start)
    of_parts[..., 5] = np.maximum(key_stop, key_start)
    if len(parts) == keys.parts:
        return torch.from_numpy(of_parts)
    ranges = np.zeros((keys.parts, *of_parts.shape[1:]), dtype=np.int64)
    ranges[..., 0], ranges[..., 1] = bounds[:, :-1], bounds[:, 1:]
    ranges[parts] = of_parts
    return torch.from_numpy(ranges)
