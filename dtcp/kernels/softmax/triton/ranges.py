"""Look intervals of positions up in the keys' positions, on the GPU: once a call, two launches.

The host's spans (spans.py) say the same of its own tiles. Looking up again costs less than the
way to the device, and every kernel is free to choose its tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtcp.kernels.softmax.triton.tiles import NOWHERE, Runs, View
from dtcp.kernels.softmax.types import Keys, Queries

SCAN = 1024  # tiles of queries that key_reach looks at together


class QueryRuns(NamedTuple):
    """The run of keys of each query, and what is known of a tile of them."""

    begin: Tensor  # [rows, L] int32
    stop: Tensor  # [rows, L] int32
    tiles: Tensor  # [rows, 4, tiles] int32: first begin, last begin, first stop, last stop

    def views(self, batch: int) -> Runs:
        """For a kernel; rows that are alike are kept once, and read by all."""
        strides = (self.begin.stride(0) if len(self.begin) == batch else 0,)
        return Runs(View(self.begin, strides), View(self.stop, strides))


def find_runs(queries: Queries, keys: Keys, tile: int) -> QueryRuns:
    """The keys that each query sees, and tiles of so many queries."""
    rows, length = queries.first_key.shape
    num_keys, num_tiles = keys.k.shape[1], triton.cdiv(length, tile)
    new = queries.first_key.new_empty
    sizes = ((rows, length), (rows, length), (rows, 4, num_tiles))
    runs = QueryRuns(*(new(size, dtype=torch.int32) for size in sizes))
    query_runs[(num_tiles, rows)](
        View.of(queries.first_key),
        View.of(queries.last_key),
        keys.token_index.contiguous(),
        *runs,
        length,
        num_keys,
        num_keys.bit_length(),
        TILE=tile,
    )
    return runs


def find_reach(runs: QueryRuns, num_keys: int, block: int, batch: int) -> View:
    """The tiles of queries that see each block of keys: [rows, blocks, 4] int32."""
    rows, _, num_tiles = runs.tiles.shape
    blocks = triton.cdiv(num_keys, block)
    reach = runs.tiles.new_empty((rows, blocks, 4))
    key_reach[(blocks, rows)](runs.tiles, reach, num_tiles, BLOCK=block, STEP=SCAN)
    return View(reach, (reach.stride(0) if rows == batch else 0,))


# How many keys a step has changes with the documents, and makes no other kernel.
@triton.jit(do_not_specialize=["num_keys", "steps"])
def query_runs(
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
    """Grid: (tiles, rows)."""
    tile, row = tl.program_id(0), tl.program_id(1)
    query = tile * TILE + tl.arange(0, TILE)
    real = query < length
    first = _of_queries(first_key, row, query, length)
    last = _of_queries(last_key, row, query, length)
    from_key = _look_up(token_index, num_keys, steps, first)
    to_key = _look_up(token_index, num_keys, steps, last + 1)
    sees = (first <= last) & (from_key < to_key) & real
    from_key, to_key = tl.where(sees, from_key, NOWHERE), tl.where(sees, to_key, 0)
    tl.store(begin + row * length + query, from_key, mask=real)
    tl.store(stop + row * length + query, to_key, mask=real)
    # A tile that the end of the queries cuts short holds some that see nothing: it is not full.
    num_tiles = tl.num_programs(0)
    at = tiles + row * 4 * num_tiles + tile
    tl.store(at, tl.min(from_key))
    tl.store(at + num_tiles, tl.max(from_key))
    tl.store(at + 2 * num_tiles, tl.min(to_key))
    tl.store(at + 3 * num_tiles, tl.max(to_key))


@triton.jit
def _of_queries(x, row, query, length):
    at = row * x.strides[0] + tl.minimum(query, length - 1) * x.strides[1]
    return tl.load(x.at + at).to(tl.int32)


@triton.jit
def _look_up(token_index, num_keys, steps, wanted):
    """Index of the first key at or after a position; keys ascend, and behind them are UNUSED."""
    low = wanted * 0
    high = low + num_keys
    for _ in range(steps):
        middle = (low + high) // 2
        found = tl.load(token_index + middle, mask=middle < num_keys, other=-1).to(tl.int32)
        before = (found >= 0) & (found < wanted)
        low = tl.where(before & (low < high), middle + 1, low)
        high = tl.where(before, high, tl.minimum(middle, high))
    return low


@triton.jit
def key_reach(tiles, reach, num_tiles, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Grid: (blocks of keys, rows). First tile, first and past the last full one, past the last.

    Intervals move on with the query, so these tiles are neighbours; where they are not, some
    between them find nothing to see.
    """
    block, row = tl.program_id(0), tl.program_id(1)
    key = block * BLOCK
    lowest = tl.full((STEP,), NOWHERE, tl.int32)
    highest = tl.zeros((STEP,), tl.int32)
    full_lowest, full_highest, full = lowest, highest, highest
    for start in range(0, num_tiles, STEP):
        tile = start + tl.arange(0, STEP)
        real = tile < num_tiles
        at = tiles + row * 4 * num_tiles + tile
        first_begin = tl.load(at, mask=real, other=NOWHERE)
        last_begin = tl.load(at + num_tiles, mask=real, other=NOWHERE)
        first_stop = tl.load(at + 2 * num_tiles, mask=real, other=0)
        last_stop = tl.load(at + 3 * num_tiles, mask=real, other=0)
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
    at = reach + (row * tl.num_programs(0) + block) * 4
    tl.store(at, begin)
    tl.store(at + 1, tl.where(unbroken, full_begin, begin))
    tl.store(at + 2, tl.where(unbroken, full_stop, begin))
    tl.store(at + 3, stop)
