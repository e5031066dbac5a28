"""Which keys a tile of queries sees, worked out on the host once a batch.

Every mask is one interval of positions per query (masks.py) and keys are lined up by ascending
position, so a tile of neighbouring queries sees one run of keys, and an inner run of it is seen
by all of its queries:

    key_start      full_start            full_stop       key_stop
        |  some see    |   every query sees   |   some see   |

Only the outer parts need a mask at all, and what lies outside is never touched. Tables have
one row a tile of queries, never one a pair of tokens.
"""

import torch
from torch import Tensor

TILE = 128
FIELDS = ("q_start", "q_stop", "key_start", "full_start", "full_stop", "key_stop")
UNUSED = -1  # the position of a key slot that holds no key


def block_ranges(
    first_key: Tensor, last_key: Tensor, key_token_index: Tensor, *, tile: int = TILE
) -> Tensor:
    """The runs of keys each tile of queries sees.

    Args:
        first_key, last_key: [B, L], the interval of positions each query sees.
        key_token_index: [K], ascending, then UNUSED where a buffer is longer than its keys.
        tile: queries a tile.
    Returns:
        [B, ceil(L / tile), 6] int64 on the host: FIELDS, in queries and keys of the local order.
    """
    keys = key_token_index[key_token_index != UNUSED].contiguous()
    if bool((keys.diff() <= 0).any()):
        raise ValueError(
            "Keys are lined up by ascending position, got positions that go down or repeat: use "
            "a layout whose shards ascend."
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


def _tiled(x: Tensor, tiles: int, tile: int) -> Tensor:
    """[B, L] -> [B, tiles, tile]; the last tile is filled up with queries that are none."""
    rest = tiles * tile - x.shape[1]
    return torch.nn.functional.pad(x, (0, rest), value=-1).view(x.shape[0], tiles, tile)
