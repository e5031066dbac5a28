"""Attention to a window of raw keys and to compressed entries of all that came before.

The mixer of DeepSeek-V4. A query sees the keys of its window, and of the entries, each pooled
from a window of `ratio` tokens of its document, those whose last token is not ahead of it; with
an indexer only the best of them. Windows are counted from the start of a document, and what is
left at its end makes no entry. All of it is a predicate on coordinates: an entry stands where
its last token does, so what a query sees is again one interval of positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.sparse.indexer import select_entries
from dtcp.kernels.sparse.pooling import Prepool, Windows, pool
from dtcp.kernels.sparse.read_ranges import entry_runs, key_runs
from dtcp.kernels.sparse.reference import TILE, Sight
from dtcp.mixer import BatchMetadata, Mixer, check_position_ids, position_ids_of
from dtcp.sequence.layout import Run, SequenceLayout
from dtcp.sequence.masks import Coords
from dtcp.sparse.op import sparse_attention

__all__ = ["CompressedSparseAttention", "Compression", "Index", "Prepool"]

NOWHERE = torch.iinfo(torch.int32).max
"""Position of an entry that is none: ahead of every query."""


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
        if self.ratio < 1 or (self.selected is not None and self.selected < 1):
            raise ValueError(
                f"Compression pools ratio >= 1 tokens and reads selected >= 1 entries, got "
                f"ratio={self.ratio}, selected={self.selected}: give None to read all entries."
            )

    @property
    def reach(self) -> int:
        """Tokens to the left of its last one that an entry is pooled from."""
        return self.ratio * (2 if self.overlap else 1) - 1


class Index(NamedTuple):
    """What an indexer scores entries by: sum_h weight_h * relu(q_h . key). Has no gradient."""

    q: Tensor  # [B, L, H, D], sizes of the indexer's own
    weight: Tensor  # [B, L, H]
    keys: Prepool


class SparseMetadata(NamedTuple):
    """What the mixer reads of a batch. As in all tables, int64 stays on the host."""

    window_first: Tensor  # [B, L] int32
    first: Tensor  # [B, L] int32
    last: Tensor  # [B, L] int32
    position_ids: Tensor  # [B, L] int32
    key_token_index: Tensor  # [K] int32
    closing: Tensor  # [B, P] int32
    end: Tensor  # [B, E] int32
    has_previous: Tensor  # [B, E] int32
    position: Tensor  # [B, E] int32
    order: Tensor  # [segments of all ranks] int32: where the next segment's entries arrive
    key_run: Tensor  # [B, L, 2] int32
    key_readers: Tensor  # [B, K, 2] int32
    entry_run: Tensor  # [B, L, 2] int32
    entry_readers: Tensor  # [B, P, 2] int32
    tiles: Tensor  # [B, tiles, 6] int64
    routes: Tensor  # [2 (keys, tokens to pool), 2 (send, receive), hops, 3] int64

    @property
    def sight(self) -> Sight:
        return Sight(**{name: getattr(self, name) for name in Sight._fields})

    @property
    def windows(self) -> Windows:
        return Windows(self.end, self.has_previous, self.position)


class CompressedSparseAttention(Mixer):
    """Attend to a window of raw keys and to compressed entries, K = V, one head of keys.

    Args:
        window: raw keys a query sees, its own included.
        compression: None for the window alone.
        scale: factor on the scores.
    """

    def __init__(self, window: int, compression: Compression | None, *, scale: float) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(
                f"A window counts the query itself, got window={window}: 1 sees only itself."
            )
        self.window, self.compression, self.scale = window, compression, scale
        self.metadata_key = f"window={window} {compression}"

    def forward(
        self,
        q: Tensor,
        keys: Tensor,
        metadata: BatchMetadata,
        *,
        sink: Tensor,
        tokens: Prepool | None = None,
        index: Index | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: [B, L, H, D], rotated.
            keys: [B, L, D], rotated; values too.
            sink: [H].
            tokens: to pool; given if the mixer has a compression.
            index: given if the compression selects.
        Returns:
            [B, L, H, D].
        """
        given = SparseMetadata(*self.own(metadata))
        if given.last.shape != q.shape[:2]:
            raise ValueError(
                f"Compressed sparse attention reads the tables of its own batch, got tables for "
                f"{tuple(given.last.shape)} tokens with q.shape={tuple(q.shape)}: pass the tables "
                f"that were made with this batch."
            )
        how = self.compression
        if how is None:
            keys, _ = self.bring(keys, None, given)
            return sparse_attention(q, keys, None, None, sink, given.sight, scale=self.scale)
        assert tokens is not None
        keys, (tokens, *of_index) = self._bring(keys, tokens, index, given)
        entries = self.gather(self._entries(tokens, given), given)
        selected = None
        if how.selected is not None:
            assert index is not None
            with torch.no_grad():
                index_keys = self.gather(self._entries(of_index[0], given), given)
                seen = (given.first, given.last, given.closing, given.tiles)
                number = min(how.selected, entries.shape[1])
                asked = (index.q.detach(), index.weight.detach())
                selected = select_entries(*asked, index_keys, *seen, number)
        return sparse_attention(q, keys, entries, selected, sink, given.sight, scale=self.scale)

    def check_position_ids(self, position: Tensor, metadata: BatchMetadata) -> None:
        """Stop a model that rotates by other positions [B, L] than entries are rotated by."""
        given = SparseMetadata(*self.own(metadata))
        check_position_ids(position, given.position_ids, given.last >= 0)

    def alone(self, *args: Any, **kwargs: Any) -> Tensor:
        q, keys = args[:2]
        own: Tensor = keys[:, :, None].expand_as(q)
        return own

    def own(self, metadata: BatchMetadata) -> Sequence[Tensor]:
        """The tables of this kind of mixer."""
        return metadata[self.metadata_key]

    def bring(
        self, keys: Tensor, pooled: Tensor | None, metadata: SparseMetadata
    ) -> tuple[Tensor, Tensor | None]:
        """Line up the keys and the tokens to pool with those just left of them; here: none are."""
        return keys, pooled

    def gather(self, entries: Tensor, metadata: SparseMetadata) -> Tensor:
        """The entries of the whole sequence, in the order of their positions; here: all are."""
        return entries

    def make_metadata(self, coords: Coords, layout: SequenceLayout | None) -> Sequence[Tensor]:
        if layout is not None and layout.num_shards > 1:
            raise ValueError(
                f"A sequence is sharded only where every mixer is claimed by a plan, got an "
                f"unclaimed {self} with {layout}: add a style for it to the plan."
            )
        whole = [[(0, coords.token_index.shape[1])]]
        return sparse_metadata(coords, whole, 0, self.window, self.compression, halo=False)

    def extra_repr(self) -> str:
        return f"window={self.window}, compression={self.compression}, scale={self.scale}"

    def _bring(
        self, keys: Tensor, tokens: Prepool, index: Index | None, metadata: SparseMetadata
    ) -> tuple[Tensor, list[Prepool]]:
        """Bring keys, and all that is pooled as one tensor: so there is one exchange."""
        pooled = [tokens] if index is None else [tokens, index.keys]
        parts = [x for one in pooled for x in (one.value, one.gate)]
        parts[2:] = [x.detach() for x in parts[2:]]
        keys, lined_up = self.bring(keys, torch.cat(parts, dim=-1), metadata)
        assert lined_up is not None
        split = lined_up.split([x.shape[-1] for x in parts], dim=-1)
        pairs = zip(pooled, split[::2], split[1::2], strict=True)
        return keys, [Prepool(value, gate, one.bias, one.finish) for one, value, gate in pairs]

    def _entries(self, tokens: Prepool, metadata: SparseMetadata) -> Tensor:
        assert self.compression is not None
        pooled = pool(tokens, metadata.windows, overlap=self.compression.overlap)
        return tokens.finish(pooled, metadata.position)


def sparse_metadata(
    coords: Coords,
    segments: Sequence[Sequence[Run]],
    rank: int,
    window: int,
    compression: Compression | None,
    *,
    halo: bool,
    tile: int = TILE,
) -> SparseMetadata:
    """Work out once a batch, on the host, what the mixer reads on one rank.

    Args:
        segments: stretches of positions that each rank holds, as long and as many on each.
        halo: whether each segment is lined up after the tokens just left of it.
    """
    _check_counted(coords)
    mine = segments[rank]
    here = torch.cat([torch.arange(*run) for run in mine])
    at = coords.at(here)
    last = at.token_index.masked_fill(at.document < 0, -1)
    window_first = torch.maximum(at.start, at.token_index - (window - 1))
    left = window - 1 if halo else 0
    key_token_index = torch.cat([torch.arange(start - left, stop) for start, stop in mine])
    closing, order = _all_entries(coords, segments, compression)
    key_run, key_readers = key_runs(window_first, last, mine, left)
    entry_run, entry_readers = entry_runs(at.start, last, closing, mine)
    return SparseMetadata(
        window_first.int(),
        at.start.int(),
        last.int(),
        position_ids_of(at),
        key_token_index.clamp(min=-1).int(),
        closing.int(),
        *_own_entries(coords, mine, compression, halo=halo),
        order.int(),
        key_run.int(),
        key_readers.int(),
        entry_run.int(),
        entry_readers.int(),
        _tiles(entry_run, mine, window, left, tile),
        torch.zeros(2, 2, 0, 3, dtype=torch.int64),
    )


def _check_counted(coords: Coords) -> None:
    """Refuse positions that do not count a document's tokens: an entry has none of its own."""
    found = position_ids_of(coords)
    other = (found != coords.token_index - coords.start) & (coords.document >= 0)
    if bool(other.any()):
        row, token = other.nonzero()[0].tolist()
        raise ValueError(
            f"Compressed entries stand at the place of their window in its document, so tokens "
            f"do too, got position[{row}, {token}]={int(found[row, token])} for token "
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
    found = coords.token_index.new_full((coords.token_index.shape[0], room + 1), NOWHERE)
    if compression is not None:
        position = coords.token_index[:, start:stop]
        within = position - coords.start[:, start:stop] + 1
        closes = (coords.document[:, start:stop] >= 0) & (within % compression.ratio == 0)
        found.scatter_(1, torch.where(closes, closes.cumsum(1) - 1, room), position)
    return found[:, :room]


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
    spans, base, query = [], 0, 0
    for first, stop in mine:
        length = stop - first
        for offset in range(0, length, tile):
            end = min(offset + tile, length)
            keys = (base + max(0, left + offset - (window - 1)), base + left + end)
            spans.append((query + offset, query + end, *keys))
        base, query = base + left + length, query + length
    shared = torch.tensor(spans)
    number = torch.arange(len(spans)).repeat_interleave(shared[:, 1] - shared[:, 0])
    low, high = entry_run.unbind(-1)
    low, number = low.where(low < high, NOWHERE), number.expand_as(low)
    none = low.new_full((len(low), len(spans)), NOWHERE)
    low = none.scatter_reduce(1, number, low, "amin")
    high = (0 * none).scatter_reduce(1, number, high, "amax")
    entries = torch.stack((low.where(low < high, 0), high), dim=-1)
    return torch.cat((shared.expand(len(low), -1, -1), entries), dim=-1)
