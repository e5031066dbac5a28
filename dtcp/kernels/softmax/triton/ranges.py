"""Look the queries' intervals up in the keys' token indices, on the GPU: two launches per call.

The host's block ranges say the same for tiles of its own. To look up again costs less than to
copy a table to the device, and lets every kernel choose its own tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtcp.kernels.softmax.triton.tiles import NO_KEY, RangeOperands
from dtcp.kernels.softmax.types import Keys, Queries
from dtcp.kernels.triton_support import StridedTensor

SCAN = 1024
"""Tiles of queries that `query_tile_kernel` reads at a time."""


class KeyRanges(NamedTuple):
    """The range of keys that each query sees, and its bounds over each tile of queries."""

    begin: Tensor  # [rows, L] int32
    stop: Tensor  # [rows, L] int32
    tiles: Tensor  # [rows, 4, tiles] int32: least and largest begin, least and largest stop

    def operands(self, batch: int) -> RangeOperands:
        """For a kernel over `batch` rows, which all read the same row where only one is kept."""
        strides = (self.begin.stride(0) if len(self.begin) == batch else 0,)
        return RangeOperands(StridedTensor(self.begin, strides), StridedTensor(self.stop, strides))


def find_key_ranges(queries: Queries, keys: Keys, tile: int) -> KeyRanges:
    """The keys that each query sees; `tile` is queries per tile."""
    rows, length = queries.first_key.shape
    num_keys, num_tiles = keys.k.shape[1], triton.cdiv(length, tile)
    new = queries.first_key.new_empty
    sizes = ((rows, length), (rows, length), (rows, 4, num_tiles))
    ranges = KeyRanges(*(new(size, dtype=torch.int32) for size in sizes))
    key_range_kernel[(num_tiles, rows)](
        StridedTensor.of(queries.first_key),
        StridedTensor.of(queries.last_key),
        keys.token_index.contiguous(),
        *ranges,
        length,
        num_keys,
        num_keys.bit_length(),
        TILE=tile,
    )
    return ranges


def find_query_tiles(ranges: KeyRanges, num_keys: int, block: int, batch: int) -> StridedTensor:
    """The tiles of queries that see each block of keys: [rows, blocks, 4] int32."""
    rows, _, num_tiles = ranges.tiles.shape
    blocks = triton.cdiv(num_keys, block)
    tiles = ranges.tiles.new_empty((rows, blocks, 4))
    query_tile_kernel[(blocks, rows)](ranges.tiles, tiles, num_tiles, BLOCK=block, STEP=SCAN)
    return StridedTensor(tiles, (tiles.stride(0) if rows == batch else 0,))


# The number of keys in a step changes with the documents, and must not compile another kernel.
@triton.jit(do_not_specialize=["num_keys", "steps"])
def key_range_kernel(
    first_key,
    last_key,
    token_index,
    begin,
    stop,
    tiles,
    length,
    num_keys,
    steps,
    TILE: tl.constexpr,
):
    """Grid: (tiles, rows). Writes the three tensors of KeyRanges."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query = tile * TILE + tl.arange(0, TILE)
    real = query < length
    first = _load_interval_end(first_key, row, query, length)
    last = _load_interval_end(last_key, row, query, length)
    from_key = _look_up(token_index, num_keys, steps, first)
    to_key = _look_up(token_index, num_keys, steps, last + 1)
    sees = (first <= last) & (from_key < to_key) & real
    from_key, to_key = tl.where(sees, from_key, NO_KEY), tl.where(sees, to_key, 0)
    tl.store(begin + row * length + query, from_key, mask=real)
    tl.store(stop + row * length + query, to_key, mask=real)
    # Where the queries end inside a tile, the rest of it sees nothing: such a tile is not full.
    num_tiles = tl.num_programs(0)
    bounds = tiles + row * 4 * num_tiles + tile
    tl.store(bounds, tl.min(from_key))
    tl.store(bounds + num_tiles, tl.max(from_key))
    tl.store(bounds + 2 * num_tiles, tl.min(to_key))
    tl.store(bounds + 3 * num_tiles, tl.max(to_key))


@triton.jit
def _load_interval_end(x, row, query, length):
    offset = row * x.strides[0] + tl.minimum(query, length - 1).to(tl.int64) * x.strides[1]
    return tl.load(x.pointer + offset).to(tl.int32)


@triton.jit
def _look_up(token_index, num_keys, steps, wanted):
    """Index of the first key at or after a token index; keys ascend, and UNUSED slots follow."""
    low = wanted * 0
    high = low + num_keys
    for _ in range(steps):
        middle = (low + high) // 2
        index = tl.load(token_index + middle, mask=middle < num_keys, other=-1).to(tl.int32)
        before = (index >= 0) & (index < wanted)
        low = tl.where(before & (low < high), middle + 1, low)
        high = tl.where(before, high, tl.minimum(middle, high))
    return low


@triton.jit
def query_tile_kernel(tiles, query_tiles, num_tiles, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Grid: (blocks of keys, rows). Writes begin, full_begin, full_stop, stop, in tiles.

    Intervals move on with the query, so the tiles that see a block are neighbours. Where they are
    not, some tiles in between are visited and find nothing to see.
    """
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key = block * BLOCK
    lowest = tl.full((STEP,), NO_KEY, tl.int32)
    highest = tl.zeros((STEP,), tl.int32)
    full_lowest, full_highest, full = lowest, highest, highest
    for start in range(0, num_tiles, STEP):
        tile = start + tl.arange(0, STEP)
        real = tile < num_tiles
        bounds = tiles + row * 4 * num_tiles + tile
        first_begin = tl.load(bounds, mask=real, other=NO_KEY)
        last_begin = tl.load(bounds + num_tiles, mask=real, other=NO_KEY)
        first_stop = tl.load(bounds + 2 * num_tiles, mask=real, other=0)
        last_stop = tl.load(bounds + 3 * num_tiles, mask=real, other=0)
        some = (first_begin < key + BLOCK) & (last_stop > key)
        lowest = tl.where(some, tl.minimum(lowest, tile), lowest)
        highest = tl.where(some, tl.maximum(highest, tile + 1), highest)
        every = (last_begin <= key) & (first_stop >= key + BLOCK)
        full_lowest = tl.where(every, tl.minimum(full_lowest, tile), full_lowest)
        full_highest = tl.where(every, tl.maximum(full_highest, tile + 1), full_highest)
        full += every.to(tl.int32)
    stop = tl.max(highest)
    begin = tl.minimum(tl.min(lowest), stop)
    full_begin, full_stop = tl.min(full_lowest), tl.max(full_highest)
    unbroken = (full_stop > 0) & (full_stop - full_begin == tl.sum(full))
    out = query_tiles + (row * tl.num_programs(0) + block) * 4
    tl.store(out, begin)
    tl.store(out + 1, tl.where(unbroken, full_begin, begin))
    tl.store(out + 2, tl.where(unbroken, full_stop, begin))
    tl.store(out + 3, stop)
