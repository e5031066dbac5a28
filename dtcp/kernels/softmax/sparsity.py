"""Which blocks of queries and keys a mask leaves, as kernels with block sparsity read them.

A block is full where each of its queries sees each of its keys, and partial where some query sees
some key; the rest is never computed. Both lists are made with a few launches on the device that
the tables are on, without waiting for it, and their shapes depend on sizes alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.softmax.types import Keys, Queries


class BlockLists(NamedTuple):
    """For each block of one side the blocks of the other, ascending; int32.

    Only the first `count` of each row of indices mean something.
    """

    partial_count: Tensor  # [B, blocks]
    partial_index: Tensor  # [B, blocks, blocks of the other side]
    full_count: Tensor
    full_index: Tensor


def query_blocks(queries: Queries, keys: Keys, query_block: int, key_block: int) -> BlockLists:
    """For each block of queries the blocks of keys that it reads: for forward."""
    return _lists(*block_states(queries, keys, query_block, key_block))


def key_blocks(queries: Queries, keys: Keys, query_block: int, key_block: int) -> BlockLists:
    """For each block of keys the blocks of queries that read it: for backward."""
    partial, full = block_states(queries, keys, query_block, key_block)
    return _lists(partial.transpose(1, 2), full.transpose(1, 2))


def block_states(
    queries: Queries, keys: Keys, query_block: int, key_block: int
) -> tuple[Tensor, Tensor]:
    """Which blocks are partial and which are full: two [B, query blocks, key blocks] bool.

    A block of keys between those that a block of queries sees counts as partial, even if no query
    of the block sees any of it.
    """
    rows, length = queries.q.shape[:2]
    num_keys = keys.k.shape[1]
    begin, stop = (x.expand(rows, -1) for x in _key_ranges(queries, keys))
    sees = begin < stop
    tiles = -(-length // query_block)
    first = _by_tile(begin.masked_fill(~sees, num_keys), tiles, query_block, num_keys).amin(-1)
    last = _by_tile(stop, tiles, query_block, 0).amax(-1)
    # Of a full block every query sees every key; the queries that the last tile lacks have no say.
    inner_first = _by_tile(begin.masked_fill(~sees, num_keys), tiles, query_block, 0).amax(-1)
    inner_last = _by_tile(stop, tiles, query_block, num_keys).amin(-1)
    start = torch.arange(-(-num_keys // key_block), device=begin.device) * key_block
    end = start + key_block
    some = (start < last[..., None]) & (end > first[..., None])
    full = (start >= inner_first[..., None]) & (end <= inner_last[..., None])
    return some & ~full, full


def _key_ranges(queries: Queries, keys: Keys) -> tuple[Tensor, Tensor]:
    """The keys that each query sees: begin and stop, [rows, L] int64; 0 and 0 for none."""
    # Slots without a key lie behind all keys.
    index = keys.token_index.to(torch.int64)
    index = torch.where(index < 0, torch.iinfo(torch.int64).max, index)
    first, last = (x.to(torch.int64).contiguous() for x in (queries.first_key, queries.last_key))
    begin = torch.searchsorted(index, first)
    stop = torch.searchsorted(index, last, right=True)
    sees = (first <= last) & (begin < stop)
    return torch.where(sees, begin, 0), torch.where(sees, stop, 0)


def _by_tile(x: Tensor, tiles: int, tile: int, fill: int) -> Tensor:
    """[B, L] -> [B, tiles, tile], with `fill` for the queries that the last tile lacks."""
    rest = tiles * tile - x.shape[1]
    return torch.nn.functional.pad(x, (0, rest), value=fill).unflatten(1, (tiles, tile))


def _lists(partial: Tensor, full: Tensor) -> BlockLists:
    return BlockLists(*_list(partial), *_list(full))


def _list(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and ascending indices of what is True along the last dim."""
    place = wanted.cumsum(-1, dtype=torch.int32)
    others = wanted.shape[-1]
    index = torch.arange(others, device=wanted.device, dtype=torch.int32).expand_as(wanted)
    # What is not wanted goes behind the end.
    slot = torch.where(wanted, place - 1, others).to(torch.int64)
    packed = place.new_zeros(*wanted.shape[:-1], others + 1).scatter_(-1, slot, index)
    return place[..., -1].contiguous(), packed[..., :others].contiguous()
