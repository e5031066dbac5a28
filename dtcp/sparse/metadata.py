"""What compressed sparse attention reads of a batch, worked out on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dtcp.kernels.sparse.pooling import Windows
from dtcp.kernels.sparse.read_ranges import entry_runs, key_runs
from dtcp.kernels.sparse.types import NOWHERE, SPARSE_TILE, Sight
from dtcp.metadata import AttentionMetadata, HostTensor, no_indices, no_sizes
from dtcp.mixer_positions import position_ids_of
from dtcp.sequence.arguments import check_ints
from dtcp.sequence.coords import Coords
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.node_routes import NodeRoutes
from dtcp.sequence.partition import Run
from dtcp.sparse.exchange import halo_routes


@dataclass(frozen=True)
class Compression:
    """How tokens become entries.

    Args:
        ratio: tokens an entry stands for.
        overlap: an entry is pooled from the window before its own, too.
        selected: entries that an indexer picks for each query; None: it reads all it sees.
    """

    ratio: int
    overlap: bool = False
    selected: int | None = None

    def __post_init__(self) -> None:
        selected = 1 if self.selected is None else self.selected
        check_ints("Compression", ratio=self.ratio, selected=selected)
        if self.ratio < 1 or (self.selected is not None and self.selected < 1):
            raise ValueError(
                f"Compression pools ratio >= 1 tokens and reads selected >= 1 entries, got "
                f"ratio={self.ratio}, selected={self.selected}: give None to read all entries."
            )

    @property
    def reach(self) -> int:
        """Tokens to the left of its last one that an entry is pooled from."""
        return self.ratio * (2 if self.overlap else 1) - 1


@dataclass(frozen=True, eq=False)
class SparseMetadata(AttentionMetadata):
    """What the mixer reads of a batch on one rank."""

    window_first: Tensor  # [B, L] int32
    first: Tensor  # [B, L] int32
    last: Tensor  # [B, L] int32
    position_ids: Tensor  # [B, L] int32
    key_token_index: Tensor  # [K] int32
    closing: Tensor  # [B, P] int32
    end: Tensor  # [B, E] int32
    has_previous: Tensor  # [B, E] int32
    entry_position_ids: Tensor  # [B, E] int32
    order: Tensor  # [segments of all ranks] int32: where the next segment's entries arrive
    key_run: Tensor  # [B, L, 2] int32
    key_readers: Tensor  # [B, K, 2] int32
    entry_run: Tensor  # [B, L, 2] int32
    entry_readers: Tensor  # [B, P, 2] int32
    tiles: HostTensor  # [B, tiles, 6] int64
    routes: HostTensor  # [2 (keys, tokens to pool), 2 (send, receive), hops, 3] int64
    onward: HostTensor  # likewise, of what is handed on inside a node; no hops of one tier
    # Of pieces of any lengths, on the line of all rows:
    key_order: Tensor = field(default_factory=no_indices)  # [K] int32: own keys [L] and brought
    pooled_order: Tensor = field(default_factory=no_indices)  # likewise, of tokens to pool
    entry_routes: HostTensor = field(default_factory=no_sizes)  # [1, 2, hops, 3] int64
    entry_onward: HostTensor = field(default_factory=no_sizes)  # likewise

    @property
    def halos(self) -> NodeRoutes:
        return NodeRoutes(self.routes, self.onward)

    @property
    def of_entries(self) -> NodeRoutes:
        return NodeRoutes(self.entry_routes, self.entry_onward)

    @property
    def sight(self) -> Sight:
        return Sight(**{name: getattr(self, name) for name in Sight._fields})

    @property
    def windows(self) -> Windows:
        return Windows(self.end, self.has_previous, self.entry_position_ids)


def sparse_metadata(
    coords: Coords,
    segments: Sequence[Sequence[Run]],
    rank: int,
    window: int,
    compression: Compression | None,
    *,
    halo: bool,
    tile: int = SPARSE_TILE,
) -> SparseMetadata:
    """Work out once per batch, on the host, what the mixer reads on one rank.

    Args:
        segments: stretches of positions that each rank holds, as long and as many on each.
        halo: whether each segment is lined up after the tokens just left of it.
    """
    check_counted(coords)
    mine = segments[rank]
    here = torch.cat([torch.arange(*run) for run in mine])
    local = coords.select(here)
    last = local.token_index.masked_fill(local.document < 0, -1)
    window_first = torch.maximum(local.start, local.token_index - (window - 1))
    left = window - 1 if halo else 0
    key_token_index = torch.cat([torch.arange(start - left, stop) for start, stop in mine])
    closing, order = _all_entries(coords, segments, compression)
    key_run, key_readers = key_runs(window_first, last, mine, left)
    entry_run, entry_readers = entry_runs(local.start, last, closing, mine)
    end, has_previous, entry_position_ids = _own_entries(coords, mine, compression, halo=halo)
    routes, onward = torch.zeros(2, 2, 2, 0, 3, dtype=torch.int64)
    return SparseMetadata(
        window_first=window_first.int(),
        first=local.start.int(),
        last=last.int(),
        position_ids=position_ids_of(local),
        key_token_index=key_token_index.clamp(min=-1).int(),
        closing=closing.int(),
        end=end,
        has_previous=has_previous,
        entry_position_ids=entry_position_ids,
        order=order.int(),
        key_run=key_run.int(),
        key_readers=key_readers.int(),
        entry_run=entry_run.int(),
        entry_readers=entry_readers.int(),
        tiles=_tiles(entry_run, mine, window, left, tile),
        routes=routes,
        onward=onward,
    )


def rank_metadata(
    coords: Coords,
    layout: SequenceLayout,
    rank: int,
    window: int,
    compression: Compression | None,
    ranks_per_node: int = 0,
) -> SparseMetadata:
    """The metadata of one rank.

    Args:
        ranks_per_node: neighbours that share a node; 0: nobody has said.
    """
    segments = [layout.segments(other) for other in range(layout.num_shards)]
    metadata = sparse_metadata(coords, segments, rank, window, compression, halo=True)
    reaches = [window - 1] if compression is None else [window - 1, compression.reach]
    routes, onward = halo_routes(layout, rank, reaches, ranks_per_node)
    return replace(metadata, routes=routes, onward=onward)


def check_counted(coords: Coords) -> None:
    """Refuse positions that do not count a document's tokens: an entry has none of its own."""
    if coords.position_ids is None:
        return
    position_ids = position_ids_of(coords)
    other = (position_ids != coords.token_index - coords.start) & (coords.document >= 0)
    if bool(other.any()):
        row, token = other.nonzero()[0].tolist()
        raise ValueError(
            f"Compressed entries stand at the place of their window in its document, so tokens "
            f"do too, got position_ids[{row}, {token}]={int(position_ids[row, token])} for token "
            f"{int((coords.token_index - coords.start)[row, token])} of its document: give "
            f"positions that count a document's tokens from 0."
        )


def segment_entries(segment_len: int, compression: Compression | None) -> int:
    """Entries that a segment has room for: their last tokens lie `ratio` apart or more."""
    return 0 if compression is None else -(-segment_len // compression.ratio)


def _closings(coords: Coords, run: Run, compression: Compression | None) -> Tensor:
    """Positions of the tokens in a run that are the last of a window: [B, E], then NOWHERE."""
    start, stop = run
    room = segment_entries(stop - start, compression)
    closing = coords.token_index.new_full((coords.token_index.shape[0], room + 1), NOWHERE)
    if compression is not None:
        token_index = coords.token_index[:, start:stop]
        within = token_index - coords.start[:, start:stop] + 1
        closes = (coords.document[:, start:stop] >= 0) & (within % compression.ratio == 0)
        closing.scatter_(1, torch.where(closes, closes.cumsum(1) - 1, room), token_index)
    return closing[:, :room]


def _all_entries(
    coords: Coords, segments: Sequence[Sequence[Run]], compression: Compression | None
) -> tuple[Tensor, Tensor]:
    """Where the entries of all ranks stand, by position; and which segment's is the next one."""
    runs = [run for mine in segments for run in mine]
    order = sorted(range(len(runs)), key=lambda index: runs[index])
    closing = torch.cat([_closings(coords, runs[index], compression) for index in order], dim=1)
    return closing, torch.tensor(order)


def _own_entries(
    coords: Coords, mine: Sequence[Run], compression: Compression | None, *, halo: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """For each entry that closes here: Windows, in tokens lined up after their halos."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    ratio = 1 if compression is None else compression.ratio
    left = compression.reach if compression is not None and halo else 0
    base = 0
    for start, stop in mine:
        closing = _closings(coords, (start, stop), compression)
        real = closing != NOWHERE
        there = torch.where(real, closing, start)
        within = there - coords.start.gather(1, there) + 1
        end = torch.where(real, base + left + there - start, 0)
        before, position = real & (within >= 2 * ratio), torch.where(real, within - ratio, 0)
        parts.append((end.int(), before.int(), position.int()))
        base += left + stop - start
    end, before, position = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
    return end, before, position


def _tiles(entry_run: Tensor, mine: Sequence[Run], window: int, left: int, tile: int) -> Tensor:
    """Tiles of neighbouring queries and the keys and entries they may see: [B, tiles, 6]."""
    ranges, base, query = [], 0, 0
    for first, stop in mine:
        length = stop - first
        for offset in range(0, length, tile):
            end = min(offset + tile, length)
            keys = (base + max(0, left + offset - (window - 1)), base + left + end)
            ranges.append((query + offset, query + end, *keys))
        base, query = base + left + length, query + length
    shared = torch.tensor(ranges)
    number = torch.arange(len(ranges)).repeat_interleave(shared[:, 1] - shared[:, 0])
    low, high = entry_run.unbind(-1)
    low, number = low.where(low < high, NOWHERE), number.expand_as(low)
    none = low.new_full((len(low), len(ranges)), NOWHERE)
    low = none.scatter_reduce(1, number, low, "amin")
    high = (0 * none).scatter_reduce(1, number, high, "amax")
    entries = torch.stack((low.where(low < high, 0), high), dim=-1)
    return torch.cat((shared.expand(len(low), -1, -1), entries), dim=-1)
