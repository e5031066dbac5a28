"""What compressed sparse attention reads where a rank's pieces are of any lengths.

All rows are one line. Documents that a rank holds whole stand next to each other; where a document
was cut, what lies just left of the cut is brought, and lined up before the tokens that follow:

    lengths=(3, 9), n=2, window=3       rank 0: 0 1 2 | 9 10 11      rank 1: 3 4 5 6 7 8
    keys of rank 0                      - - 0 1 2 | 7 8 9 10 11      (-: room that nothing fills)

Entries come from the ranks that hold what is left of this in the same documents, and from no other.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcp.kernels.sparse.types import NOWHERE, SPARSE_TILE
from dtcp.mixer_positions import position_ids_of
from dtcp.sequence.coords import Coords, documents_of
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.node_routes import NodeRoutes
from dtcp.sequence.partition import Ints, expand
from dtcp.sequence.stretches import Stretches, left_routes, with_room
from dtcp.sparse.entries import EntryRuns, entry_routes
from dtcp.sparse.exchange import stacked
from dtcp.sparse.metadata import Compression, SparseMetadata, check_counted


class _Own(NamedTuple):
    """The tokens of one rank, in the order of its slots, ascending on the line of all rows."""

    token: Ints  # [L]
    start: Ints  # [L], of the token's document; the token after it for padding
    real: NDArray[np.bool_]  # [L], no padding
    slot: Ints  # [R], of each stretch
    length: Ints  # [R]
    first: Ints  # [R]
    enters: NDArray[np.bool_]  # [R]
    room: int  # stretches that tables have room for

    @classmethod
    def of(cls, stretches: Stretches, rank: int) -> "_Own":
        line, mine = stretches.line, np.flatnonzero(stretches.rank == rank)
        pieces = np.flatnonzero(line.owner == rank)
        pieces = pieces[line.slot[pieces].argsort()]
        token = expand(line.start[pieces], line.stop[pieces] - line.start[pieces])
        document = stretches.documents.at(token)
        real = document >= 0
        # Padding sees nothing, and what comes after it stays in ascending order.
        start = token + 1
        start[real] = stretches.documents.start[document[real]]
        slot, length, first = (x[mine] for x in (stretches.slot, stretches.length, stretches.first))
        enters = stretches.enters[mine] >= 0
        return cls(token, start, real, slot, length, first, enters, stretches.room)

    def places(self, left: int) -> Ints:
        """Of each token, where each stretch is lined up after `left` tokens: [L]."""
        index = np.repeat(np.arange(len(self.slot)), self.length)
        return np.arange(len(self.token)) + (index + 1) * left

    def order(self, left: int) -> Tensor:
        """Where the tokens lined up come from: the own ones [L], then `room * left` brought."""
        shard_len, index = len(self.token), np.arange(len(self.slot))
        out = np.zeros(shard_len + self.room * left, dtype=np.int32)
        out[self.places(left)] = np.arange(shard_len)
        halo = expand(self.slot + index * left, np.full_like(index, left))
        out[halo] = shard_len + np.arange(len(halo))
        return torch.from_numpy(out)


def pieces_metadata(
    coords: Coords,
    layout: SequenceLayout,
    rank: int,
    window: int,
    compression: Compression | None,
    *,
    ranks_per_node: int = 0,
    tile: int = SPARSE_TILE,
) -> SparseMetadata:
    """The metadata of one rank, on the line of all rows.

    Args:
        ranks_per_node: neighbours that share a node; 0: nobody has said.
    """
    check_counted(coords)
    stretches = Stretches.of(layout, documents_of(coords))
    own = _Own.of(stretches, rank)
    window_first = np.maximum(own.start, own.token - (window - 1))
    last = np.where(own.real, own.token, -1)
    reaches, n = [window - 1], layout.num_shards
    windows, closing = [np.zeros(0, dtype=np.int64)] * 3, np.zeros(0, dtype=np.int64)
    of_entries = NodeRoutes(*torch.zeros(2, 2, 0, 3, dtype=torch.int64))
    if compression is not None:
        reaches.append(compression.reach)
        windows = _windows(own, compression)
        runs = EntryRuns.of(stretches, compression.ratio)
        of_entries, read = entry_routes(runs, rank, num_ranks=n, ranks_per_node=ranks_per_node)
        most = max(1, n * len(own.token) // compression.ratio)
        closing = with_room(read, most, NOWHERE)
    halos = stacked([left_routes(stretches, x, rank, ranks_per_node) for x in reaches])
    lined_up = [own.order(reach) for reach in reaches]
    key_token_index, key_run, key_readers = _keys(own, window_first, window - 1)
    entry_run, entry_readers = _entries(own, last, closing)
    tiles = _tiles(own, entry_run, window - 1, tile)
    end, has_previous, entry_position_ids = windows
    return SparseMetadata(
        window_first=_of_line(window_first),
        first=_of_line(own.start),
        last=_of_line(last),
        position_ids=layout.shard(position_ids_of(coords), rank).contiguous(),
        key_token_index=torch.from_numpy(key_token_index.astype(np.int32)),
        closing=_of_line(closing),
        end=_of_line(end),
        has_previous=_of_line(has_previous),
        entry_position_ids=_of_line(entry_position_ids),
        order=torch.zeros(0, dtype=torch.int32),
        key_run=_of_line(key_run),
        key_readers=_of_line(key_readers),
        entry_run=_of_line(entry_run),
        entry_readers=_of_line(entry_readers),
        tiles=torch.from_numpy(tiles)[None],
        routes=halos.routes,
        onward=halos.onward,
        key_order=lined_up[0],
        pooled_order=lined_up[-1] if compression is not None else lined_up[0][:0],
        entry_routes=of_entries.routes[None],
        entry_onward=of_entries.onward[None],
        in_line=True,
    )


def _of_line(x: Ints) -> Tensor:
    return torch.from_numpy(x.astype(np.int32))[None]


def _windows(own: _Own, compression: Compression) -> list[Ints]:
    """`Windows` of the entries that close here, as many as there is room for."""
    ratio = compression.ratio
    within = own.token - own.start + 1
    slots = np.flatnonzero(own.real & (within % ratio == 0))
    # A stretch that starts inside a document may close a window more than its tokens fill.
    most = max(1, len(own.token) // ratio + own.room)
    end, within = own.places(compression.reach)[slots], within[slots]
    before = (within >= 2 * ratio).astype(np.int64)
    return [with_room(x, most, 0) for x in (end, before, within - ratio)]


def _keys(own: _Own, window_first: Ints, left: int) -> tuple[Ints, Ints, Ints]:
    """The token of each key that is lined up, and runs as in `key_runs`."""
    count = len(own.token) + own.room * left
    places = own.places(left)
    token = np.full(count, -1, dtype=np.int64)
    begin, stop = np.zeros_like(token), np.zeros_like(token)
    token[places], begin[places] = own.token, np.arange(len(own.token))
    stop[places] = np.repeat(own.slot + own.length, own.length)
    entering = np.flatnonzero(own.enters)
    halo = own.slot[entering] + entering * left
    every = np.full_like(halo, left)
    there = expand(halo, every)
    token[there] = np.maximum(expand(own.first[entering] - left, every), -1)
    begin[there] = np.repeat(own.slot[entering], left)
    stop[there] = np.repeat((own.slot + own.length)[entering], left)
    stop = np.minimum(stop, np.searchsorted(window_first, token, side="right"))
    run = np.stack((places - (own.token - window_first), places + 1), axis=1)
    run[~own.real] = 0
    return token, run, _runs(begin, stop)


def _entries(own: _Own, last: Ints, closing: Ints) -> tuple[Ints, Ints]:
    """Runs as in `entry_runs`; places that hold no entry are the last ones."""
    runs = np.searchsorted(closing, own.start), np.searchsorted(closing, last, side="right")
    begin = np.searchsorted(own.token, closing)
    stop = np.searchsorted(own.start, closing, side="right")
    return _runs(*runs), _runs(begin, np.where(closing < NOWHERE, stop, 0))


def _runs(start: Ints, stop: Ints) -> Ints:
    """[..., 2] of start and stop, both 0 where the run is empty."""
    out = np.stack((start, stop), axis=-1)
    out[start >= stop] = 0
    return out


def _tiles(own: _Own, entry_run: Ints, left: int, tile: int) -> Ints:
    """Tiles of neighbouring queries of one stretch, and what they may see; then empty ones."""
    each = -(-own.length // tile)
    index = np.repeat(np.arange(len(each)), each)
    offset = expand(0 * each, each) * tile
    start = own.slot[index] + offset
    stop = np.minimum(start + tile, (own.slot + own.length)[index])
    low, high = entry_run.T
    sees = low < high
    least = np.minimum.reduceat(np.where(sees, low, NOWHERE), start)
    most = np.maximum.reduceat(np.where(sees, high, 0), start)
    least = np.where(least < most, least, 0)
    # The first query of a tile sees what is lined up from its own place on, `left` to its left.
    tiles = np.stack((start, stop, start + index * left, stop + (index + 1) * left, least, most), 1)
    return with_room(tiles, -(-len(own.token) // tile) + own.room, 0)
