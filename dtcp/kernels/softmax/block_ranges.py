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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.arguments import WHOLE_NUMBERS, check_ints, check_tensor
from dtcp.sequence.interval_runs import check_intervals
from dtcp.sequence.partition import Ints
from dtcp.sequence.slot_runs import SlotRuns

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
    limits = _limits(first_key, last_key, tile)
    return _ranges(limits, lambda token: torch.searchsorted(keys, token), first_key.shape[1], tile)


@dataclass(frozen=True, eq=False)
class KeyLine:
    """Keys lined up in parts, each by ascending token index, as runs of tokens. Each field [R]."""

    part: Ints
    start: Ints
    stop: Ints
    parts: int

    def before(self, token: Tensor) -> Tensor:
        """For each part, how many of its keys come before each of these tokens: [...] to
        [parts, ...]."""
        length = self.stop - self.start
        total = np.append(0, np.cumsum(length))
        of_part = np.searchsorted(self.part, np.arange(self.parts + 1))
        beyond = int(self.stop.max(initial=0)) + 1
        at = token.clamp(max=beyond).numpy()
        part = np.arange(self.parts).reshape(-1, *(1,) * at.ndim)
        line = self.part * (beyond + 1) + self.start
        # The last run that starts at the token or before it, where the part has one.
        run = np.searchsorted(line, part * (beyond + 1) + at, side="right") - 1
        inside = run >= of_part[part]
        run = np.where(inside, run, 0)
        some = np.clip(at - self.start[run], 0, length[run]) if len(length) else 0 * run
        count = np.where(inside, total[run] + some - total[of_part[part]], 0)
        return torch.from_numpy(count)


def block_ranges_of_parts(rows: Sequence[SlotRuns], keys: KeyLine, *, tile: int = TILE) -> Tensor:
    """`block_ranges` of rows of queries for keys in several parts, from runs.

    Returns:
        [parts, B, tiles, 6] int64.
    """
    by_row = zip(*(row.tiles(tile) for row in rows), strict=True)
    limits = _Limits(*(torch.from_numpy(np.stack(x)) for x in by_row))
    return _ranges(limits, keys.before, int(rows[0].length.sum()), tile)


class _Limits(NamedTuple):
    """`TileLimits` of rows: each [B, tiles]."""

    low: Tensor
    high: Tensor
    inner_low: Tensor
    inner_high: Tensor
    all_see: Tensor


def _limits(first_key: Tensor, last_key: Tensor, tile: int) -> _Limits:
    length = first_key.shape[1]
    tiles = -(-length // tile)
    first, last = (_tiled(x.to(torch.int64), tiles, tile) for x in (first_key, last_key))
    real = (torch.arange(tiles * tile) < length).view(tiles, tile)
    blind, beyond = (last < first) | ~real, torch.iinfo(torch.int64).max
    return _Limits(
        first.masked_fill(blind, beyond).amin(-1),
        last.masked_fill(blind, -1).amax(-1),
        first.masked_fill(~real, -1).amax(-1),
        last.masked_fill(~real, beyond).amin(-1),
        ~(blind & real).any(-1),
    )


def _ranges(limits: _Limits, before: Callable[[Tensor], Tensor], length: int, tile: int) -> Tensor:
    """From how many keys come before a token: [B, tiles, 6], with a dim before it if that has."""
    key_start = before(limits.low)
    key_stop = torch.maximum(before(limits.high + 1), key_start)
    full_start, full_stop = before(limits.inner_low), before(limits.inner_high + 1)
    full = limits.all_see & (full_start < full_stop)
    full_start = torch.where(full, full_start, key_start)
    full_stop = torch.where(full, full_stop, key_start)
    q_start = (torch.arange(limits.low.shape[-1]) * tile).expand_as(key_start)
    q_stop = (q_start + tile).clamp(max=length)
    return torch.stack((q_start, q_stop, key_start, full_start, full_stop, key_stop), dim=-1)


def _tiled(x: Tensor, tiles: int, tile: int) -> Tensor:
    """[B, L] -> [B, tiles, tile]; -1 in place of the queries that the last tile lacks."""
    rest = tiles * tile - x.shape[1]
    return torch.nn.functional.pad(x, (0, rest), value=-1).view(x.shape[0], tiles, tile)
