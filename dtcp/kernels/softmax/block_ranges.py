"""Which keys each tile of queries sees, worked out on the host once per batch.

Every mask is one interval of token indices per query (dtcp/sequence/masks.py), and keys are in
ascending order. So a tile of neighbouring queries sees one range of keys, and an inner part of it
is seen by every query of the tile; in FlexAttention's words, full blocks between partial ones:

    key_start      full_start            full_stop       key_stop
        |  partial     |         full          |  partial    |

Only the partial ends need a mask, and keys outside the range are never read. The table has one
row per tile of queries, never one entry per pair of tokens.
"""

import torch
from torch import Tensor

from dtcp.sequence.arguments import WHOLE_NUMBERS, check_ints, check_tensor

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
    batch, length = first_key.shape
    tiles = -(-length // tile)
    first, last = (_tiled(x.to(torch.int64), tiles, tile) for x in (first_key, last_key))
    real = (torch.arange(tiles * tile) < length).view(tiles, tile)
    blind, beyond = (last < first) | ~real, torch.iinfo(torch.int64).max
    low = first.masked_fill(blind, beyond).amin(-1)
    high = last.masked_fill(blind, -1).amax(-1)
    all_see = ~(blind & real).any(-1)
    inner_low = first.masked_fill(~real, -1).amax(-1)
    inner_high = last.masked_fill(~real, beyond).amin(-1)

    key_start = torch.searchsorted(keys, low)
    key_stop = torch.maximum(torch.searchsorted(keys, high, right=True), key_start)
    full_start = torch.searchsorted(keys, inner_low)
    full_stop = torch.searchsorted(keys, inner_high, right=True)
    full = all_see & (full_start < full_stop)
    full_start = torch.where(full, full_start, key_start)
    full_stop = torch.where(full, full_stop, key_start)
    q_start = (torch.arange(tiles) * tile).expand(batch, tiles)
    q_stop = (q_start + tile).clamp(max=length)
    return torch.stack((q_start, q_stop, key_start, full_start, full_stop, key_stop), dim=-1)


def check_intervals(first_key: Tensor, last_key: Tensor) -> None:
    """Refuse what is no interval per query, [B, L] each."""
    named = {"first_key": first_key, "last_key": last_key}
    check_tensor("Attention", shape="[B, L]", ndim=2, dtypes=WHOLE_NUMBERS, **named)
    if first_key.shape != last_key.shape:
        raise ValueError(
            f"A query sees the keys from a first to a last one, got first_key.shape="
            f"{tuple(first_key.shape)}, last_key.shape={tuple(last_key.shape)}: take both from "
            f"Mask.intervals."
        )


def _tiled(x: Tensor, tiles: int, tile: int) -> Tensor:
    """[B, L] -> [B, tiles, tile]; -1 in place of the queries that the last tile lacks."""
    rest = tiles * tile - x.shape[1]
    return torch.nn.functional.pad(x, (0, rest), value=-1).view(x.shape[0], tiles, tile)
