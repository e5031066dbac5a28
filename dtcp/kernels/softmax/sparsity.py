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
    tiles = -(-length // query_block)
    first, inner_first = _by_tile(begin, tiles, query_block).aminmax(dim=-1)
    inner_last, last = _by_tile(stop, tiles, query_block).aminmax(dim=-1)
    start = torch.arange(0, num_keys, key_block, device=begin.device, dtype=begin.dtype)
    end = start + key_block
    some = (start < last[..., None]) & (end > first[..., None])
    # Of a full block every query sees every key.
    full = (start >= inner_first[..., None]) & (end <= inner_last[..., None])
    return some & ~full, full


def _key_ranges(queries: Queries, keys: Keys) -> tuple[Tensor, Tensor]:
    """The keys that each query sees: begin and stop, [rows, L] int32; all and 0 for none."""
    first, last = (x.contiguous() for x in (queries.first_key, queries.last_key))
    # Slots without a key lie behind all keys.
    index = keys.token_index.to(first.dtype)
    index = torch.where(index < 0, torch.iinfo(index.dtype).max, index)
    begin = torch.searchsorted(index, first, out_int32=True)
    stop = torch.searchsorted(index, last, right=True, out_int32=True)
    sees = (first <= last) & (begin < stop)
    return torch.where(sees, begin, keys.k.shape[1]), torch.where(sees, stop, 0)


def _by_tile(x: Tensor, tiles: int, tile: int) -> Tensor:
    """[B, L] -> [B, tiles, tile]; the last query stands for those that the last tile lacks."""
    rest = tiles * tile - x.shape[1]
    if rest:
        x = torch.cat((x, x[:, -1:].expand(-1, rest)), dim=1)
    return x.unflatten(1, (tiles, tile))


def _lists(partial: Tensor, full: Tensor) -> BlockLists:
    """Counts and ascending indices of what is True along the last dim."""
    wanted = torch.stack((partial, full))
    place = wanted.cumsum(-1, dtype=torch.int32)
    others = wanted.shape[-1]
    index = torch.arange(others, device=wanted.device, dtype=torch.int32).expand_as(wanted)
    # What is not wanted goes behind the end.
    slot = torch.where(wanted, place - 1, others).to(torch.int64)
    packed = place.new_zeros(*wanted.shape[:-1], others + 1).scatter_(-1, slot, index)
    partial_count, full_count = (x.contiguous() for x in place[..., -1])
    partial_index, full_index = (x.contiguous() for x in packed[..., :others])
    return BlockLists(partial_count, partial_index, full_count, full_index)
