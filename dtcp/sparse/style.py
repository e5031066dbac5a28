"""Compressed sparse attention over a mesh axis: halos and finished entries travel, no more.

A rank lines its tokens up after those just left of each of its segments, pools the windows that
close in its shard, and gathers what all ranks pooled. A window's last token decides who pools
it, so no length of a document or shard has to be a multiple of anything.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.distributed.collectives import all_gather, connect, group_name
from dtcp.mixer import BatchMetadata
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.masks import Coords
from dtcp.sequence.routes import halo_runs
from dtcp.softmax.style import Received
from dtcp.sparse.exchange import bring_left, halo_routes, prepend_halo
from dtcp.sparse.mixer import (
    CompressedSparseAttention,
    Compression,
    SparseMetadata,
    segment_entries,
    sparse_metadata,
)


@dataclass(frozen=True)
class SparseShape:
    """Sizes of a call: what its traffic depends on, beside layout and mixer."""

    batch: int
    head_dim: int
    index_head_dim: int
    element_size: int


@dataclass
class CompressedSparseCP(ParallelStyle):
    """Carry out CompressedSparseAttention on a sequence sharded over a mesh axis.

    Three collectives forward: one exchange of halos (window - 1 raw keys, ratio - 1 tokens to
    pool or 2 ratio - 1 with overlap, a segment), an all-gather of entries, one of the indexer's
    keys. Two backward: the entries' gradients are reduce-scattered, the halos' sent home; the
    indexer has none. Gathered entries are kept for backward, S / ratio rows of one head.

    HeadTail balances the indexer, whose work grows with the position.
    """

    layouts: ClassVar[tuple[type[SequenceLayout], ...]] = (Contiguous, HeadTail)

    def check(self, layout: SequenceLayout) -> None:
        """Refuse what this strategy cannot honour, when the batch is built."""
        if not isinstance(layout, self.layouts):
            accepted = ", ".join(kind.__name__ for kind in self.layouts)
            raise ValueError(
                f"{self} works on the layouts {accepted}, got layout={layout}: use one of them."
            )

    def received(
        self, mixer: CompressedSparseAttention, layout: SequenceLayout, rank: int, of: SparseShape
    ) -> Received:
        """What `rank` will receive in a layer: a formula; tests hold the count to it."""
        row = of.batch * of.element_size
        keys = _halo_tokens(layout, rank, mixer.window - 1) * of.head_dim
        back = _asked_tokens(layout, rank, mixer.window - 1) * of.head_dim
        how = mixer.compression
        if how is None:
            return Received(keys * row, back * row)
        halves = 2 if how.overlap else 1
        index = of.index_head_dim if how.selected is not None else 0
        channels = 2 * halves * (of.head_dim + index)
        keys += _halo_tokens(layout, rank, how.reach) * channels
        back += _asked_tokens(layout, rank, how.reach) * channels
        segments = len(layout.segments(rank))
        others = (layout.num_shards - 1) * segments * segment_entries(layout.segment_len, how)
        return Received(
            (keys + others * (of.head_dim + index)) * row, (back + others * of.head_dim) * row
        )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) is not CompressedSparseAttention:
            raise TypeError(
                f"{self} takes over an unclaimed CompressedSparseAttention, got a "
                f"{type(module).__name__}: name the mixer itself in the plan."
            )
        module.__class__ = ContextParallelSparse
        cast(ContextParallelSparse, module).claim(self, device_mesh)
        return module


class ContextParallelSparse(CompressedSparseAttention):
    """A mixer that a style has taken over. Made by the style, never built directly."""

    def claim(self, style: CompressedSparseCP, mesh: DeviceMesh) -> None:
        self.style, self.mesh, self.group = style, mesh, group_name(mesh)
        self.rank, self.num_shards = mesh.get_local_rank(), mesh.size()
        connect(self.group)
        self.metadata_key = f"{self.metadata_key} by {style}"

    def bring(
        self, keys: Tensor, pooled: Tensor | None, metadata: SparseMetadata
    ) -> tuple[Tensor, Tensor | None]:
        if pooled is not None and pooled.dtype != keys.dtype:
            raise TypeError(
                f"Keys and the tokens to pool travel in one message of one dtype, got keys of "
                f"{keys.dtype} and tokens of {pooled.dtype}: convert them to one."
            )
        pieces = [keys] if pooled is None else [keys, pooled]
        segments = self._segments(metadata)
        reaches = [self.window - 1, *self._reach()]
        lengths = [segments * reach for reach in reaches]
        halos = bring_left(pieces, metadata.routes, lengths, self.group)
        keys, *rest = (
            prepend_halo(x, left, segments) for x, left in zip(pieces, halos, strict=True)
        )
        return keys, rest[0] if rest else None

    def gather(self, entries: Tensor, metadata: SparseMetadata) -> Tensor:
        found = all_gather(entries, self.mesh, dim=1)
        if self._segments(metadata) == 1:
            # They arrive in order.
            return found
        parts = found.unflatten(1, (len(metadata.order), -1))
        return parts.index_select(1, metadata.order).flatten(1, 2)

    def own(self, metadata: BatchMetadata) -> tuple[Tensor, ...]:
        if metadata is None or self.metadata_key not in metadata:
            raise ValueError(
                f"A context-parallel mixer reads the tables of its batch, got none for "
                f"{self.metadata_key!r}: pass ShardedBatch.tables of shard_batch(..., model=model)."
            )
        return tuple(metadata[self.metadata_key])

    def make_metadata(self, coords: Coords, layout: SequenceLayout | None) -> SparseMetadata:
        if layout is None or layout.num_shards != self.num_shards:
            raise ValueError(
                f"A mixer on {self.num_shards} ranks needs a layout of as many shards, got "
                f"layout={layout}: build the batch with shard_batch on the mesh of the plan."
            )
        self.style.check(layout)
        return rank_metadata(coords, layout, self.rank, self.window, self.compression)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, style={self.style}, ranks={self.num_shards}"

    def _segments(self, metadata: SparseMetadata) -> int:
        return len(metadata.order) // self.num_shards

    def _reach(self) -> list[int]:
        return [] if self.compression is None else [self.compression.reach]


def rank_metadata(
    coords: Coords,
    layout: SequenceLayout,
    rank: int,
    window: int,
    compression: Compression | None,
) -> SparseMetadata:
    """The tables of one rank."""
    segments = [layout.segments(other) for other in range(layout.num_shards)]
    metadata = sparse_metadata(coords, segments, rank, window, compression, halo=True)
    reaches = [window - 1] if compression is None else [window - 1, compression.reach]
    return metadata._replace(routes=halo_routes(layout, rank, reaches))


def work(metadata: SparseMetadata, *, selected: int | None) -> tuple[int, int]:
    """What a rank computes: pairs of query and entry that the indexer scores, and that are read.

    Counted in whole tiles, as they are carried out.
    """
    scored = read = 0
    for start, stop, key_start, key_stop, low, high in metadata.tiles.flatten(0, 1).tolist():
        scores = selected is not None and high - low > selected
        scored += (stop - start) * (high - low) * scores
        seen = high - low if selected is None else min(high - low, selected)
        read += (stop - start) * (key_stop - key_start + seen)
    return scored, read


def _halo_tokens(layout: SequenceLayout, rank: int, left: int) -> int:
    """Tokens that come from other ranks."""
    return sum(
        _held_elsewhere(layout, rank, start, stop) for start, stop in _halos(layout, rank, left)
    )


def _asked_tokens(layout: SequenceLayout, rank: int, left: int) -> int:
    """Tokens that go to other ranks, whose gradients come home."""
    mine = torch.zeros(layout.seq_len, dtype=torch.bool)
    mine[layout.token_indices(rank)] = True
    others = (other for other in range(layout.num_shards) if other != rank)
    runs = (run for other in others for run in _halos(layout, other, left))
    return sum(int(mine[start:stop].sum()) for start, stop in runs)


def _halos(layout: SequenceLayout, rank: int, left: int) -> list[tuple[int, int]]:
    runs = halo_runs(layout, rank, left=left, right=0)
    return [(max(start, 0), max(stop, 0)) for start, stop in runs[::2]]


def _held_elsewhere(layout: SequenceLayout, rank: int, start: int, stop: int) -> int:
    mine = sum(max(0, min(stop, b) - max(start, a)) for a, b in layout.runs(rank))
    return stop - start - mine
