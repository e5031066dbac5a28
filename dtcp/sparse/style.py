"""Compressed sparse attention over a mesh axis: halos and finished entries travel, no more.

A rank lines its tokens up after those just left of each of its segments, pools the windows that
close in its shard, and gathers what all ranks pooled, or what is left of its own tokens in their
documents. A window's last token decides who pools it, so no length of a document or shard has to
be a multiple of anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.moves import Moves
from dtcp.distributed.node_collectives import all_gather_on_nodes
from dtcp.distributed.relayout import RelayoutMetadata, apply_relayout
from dtcp.kernels.sparse.pooling import Prepool
from dtcp.metadata import BatchMetadata
from dtcp.mixer import ClaimedMixer, Mixer, check_position_ids
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.layout import (
    Contiguous,
    HeadTail,
    PerDocument,
    SequenceLayout,
)
from dtcp.sparse.exchange import bring_left, prepend_halo
from dtcp.sparse.metadata import SparseMetadata, rank_metadata
from dtcp.sparse.mixer import CompressedSparseAttention, Index
from dtcp.sparse.moves import SparseShape, pieces_moved, relayouts_moved, sparse_moves
from dtcp.sparse.operands import check_sparse_operands
from dtcp.sparse.pieces import pieces_metadata
from dtcp.sparse.relayout import OwnTokens, RelayoutSparseMetadata, relayout_operands
from dtcp.style import MixerShape, MixerStyle


class ContextParallelSparse(ClaimedMixer, CompressedSparseAttention):
    """A CompressedSparseAttention that a style has taken over."""

    def carry_out(
        self,
        q: Tensor,
        keys: Tensor,
        attn_metadata: BatchMetadata,
        *,
        sink: Tensor,
        tokens: Prepool | None = None,
        index: Index | None = None,
    ) -> Tensor:
        check_sparse_operands(q, keys, sink, tokens, index, self.compression)
        metadata = self.own(attn_metadata)
        if isinstance(metadata, SparseMetadata):
            if not metadata.in_line:
                return self.attend(q, keys, metadata, sink, tokens, index)
            rows = (_on_line(q), _on_line(keys))
            pooled = (_tokens_on_line(tokens), _index_on_line(index))
            out = self.attend(*rows, metadata, sink, *pooled)
            return out.view(q.shape)
        parts = [q, keys, *_tensors(tokens)]
        # An indexer has no gradient, and so none travels back.
        no_gradient = [] if index is None else [index.q, index.weight, *_tensors(index.keys)]
        parts += [x.detach() for x in no_gradient]
        q, keys, *rest = relayout_operands(parts, metadata.there, self.groups[0])
        if tokens is not None:
            tokens = tokens._replace(value=rest[0], gate=rest[1])
        if index is not None:
            of_index = index.keys._replace(value=rest[4], gate=rest[5])
            index = Index(rest[2], rest[3], of_index)
        out = self.attend(q, keys, metadata.inside, sink, tokens, index)
        return apply_relayout(out, metadata.there, self.groups[0], reverse=True)

    def check_position_ids(self, position_ids: Tensor, attn_metadata: BatchMetadata) -> None:
        metadata = self.own(attn_metadata)
        of_rank = metadata if isinstance(metadata, SparseMetadata) else metadata.here
        seen = (of_rank.last >= 0).view(of_rank.position_ids.shape)
        check_position_ids(position_ids, of_rank.position_ids, seen)

    def bring(
        self, keys: Tensor, pooled: Tensor | None, metadata: SparseMetadata
    ) -> tuple[Tensor, Tensor | None]:
        if pooled is not None and pooled.dtype != keys.dtype:
            raise TypeError(
                f"Keys and the tokens to pool travel in one message of one dtype, got keys of "
                f"{keys.dtype} and tokens of {pooled.dtype}: convert them to one."
            )
        pieces = [keys] if pooled is None else [keys, pooled]
        if metadata.in_line:
            orders = [metadata.key_order, metadata.pooled_order][: len(pieces)]
            lengths = [len(order) - keys.shape[1] for order in orders]
            halos = bring_left(pieces, *metadata.halos, lengths, self.groups[0])
            keys, *rest = (
                torch.cat((x, left), dim=1).index_select(1, order)
                for x, left, order in zip(pieces, halos, orders, strict=True)
            )
            return keys, rest[0] if rest else None
        segments = self._segments(metadata)
        reaches = [self.window - 1, *self._reach()]
        lengths = [segments * reach for reach in reaches]
        halos = bring_left(pieces, *metadata.halos, lengths, self.groups[0])
        keys, *rest = (
            prepend_halo(x, left, segments) for x, left in zip(pieces, halos, strict=True)
        )
        return keys, rest[0] if rest else None

    def gather(self, entries: Tensor, metadata: SparseMetadata) -> Tensor:
        if metadata.in_line:
            routes, number = metadata.of_entries, metadata.closing.shape[1]
            return bring_left([entries], *routes, [number], self.groups[0])[0]
        nodes = self.style.ranks_per_node
        gathered = all_gather_on_nodes(entries, self.axis, dim=1, ranks_per_node=nodes)
        if self._segments(metadata) == 1:
            # They arrive in order.
            return gathered
        parts = gathered.unflatten(1, (len(metadata.order), -1))
        return parts.index_select(1, metadata.order).flatten(1, 2)

    def _segments(self, metadata: SparseMetadata) -> int:
        return len(metadata.order) // self.num_shards

    def _reach(self) -> list[int]:
        return [] if self.compression is None else [self.compression.reach]


def _on_line(x: Tensor) -> Tensor:
    """The rows one after another: [B, L, ...] -> [1, B * L, ...]."""
    return x.flatten(0, 1)[None]


def _tokens_on_line(tokens: Prepool | None) -> Prepool | None:
    if tokens is None:
        return None
    return tokens._replace(value=_on_line(tokens.value), gate=_on_line(tokens.gate))


def _index_on_line(index: Index | None) -> Index | None:
    if index is None:
        return None
    keys = index.keys._replace(value=_on_line(index.keys.value), gate=_on_line(index.keys.gate))
    return Index(_on_line(index.q), _on_line(index.weight), keys)


def _tensors(tokens: Prepool | None) -> list[Tensor]:
    return [] if tokens is None else [tokens.value, tokens.gate]


@dataclass
class CompressedSparseCP(MixerStyle):
    """Carry out CompressedSparseAttention on a sequence sharded over a mesh axis.

    Three collectives forward: one exchange of halos (window - 1 raw keys, ratio - 1 tokens to
    pool or 2 ratio - 1 with overlap, a segment), an all-gather of entries, one of the indexer's
    keys. Two backward: the entries' gradients are reduce-scattered, the halos' sent home; the
    indexer has none. Gathered entries are kept for backward, S / ratio rows of one head.

    HeadTail balances the indexer, whose work grows with the position.

    On DocumentBalanced a halo is brought where a document was cut, no longer than what is left of
    the cut in its document, and entries go only to ranks that hold what follows in their documents.
    Of PerDocument and BlockBalanced, whose pieces are many, what the mixer is called with moves to
    HeadTail and its output back, one all-to-all each, and as much backward: more than all else that
    travels, where heads are many and wide.

    Keyword Args:
        ranks_per_node: neighbours that share a node: entries and the indexer's keys cross once to
            each node that reads them, and the entries' gradients are summed inside a node before
            they go home. So do halos; mostly one rank reads one, and no second hop is taken.
    """

    claims: ClassVar[Mapping[type[Mixer], type[ClaimedMixer]]] = {
        CompressedSparseAttention: ContextParallelSparse
    }
    layouts: ClassVar[tuple[type[SequenceLayout], ...]] = (
        Contiguous,
        HeadTail,
        PerDocument,
        BlockBalanced,
        DocumentBalanced,
    )

    def make_metadata(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> SparseMetadata | RelayoutSparseMetadata:
        assert isinstance(mixer, CompressedSparseAttention)
        self.check(mixer, layout)
        if isinstance(layout, Contiguous | HeadTail):
            return self._of_segments(mixer, coords, layout, rank)
        if issubclass(layout.kind, DocumentBalanced):
            of, nodes = (mixer.window, mixer.compression), self.ranks_per_node
            return pieces_metadata(coords, layout, rank, *of, ranks_per_node=nodes)
        inside = _inside(layout)
        return RelayoutSparseMetadata(
            RelayoutMetadata.between(layout, inside, rank),
            OwnTokens.of(coords, layout, rank),
            self._of_segments(mixer, coords, inside, rank),
        )

    def _of_segments(
        self,
        mixer: CompressedSparseAttention,
        coords: Coords,
        layout: SequenceLayout,
        rank: int,
    ) -> SparseMetadata:
        of, nodes = (mixer.window, mixer.compression), self.ranks_per_node
        return rank_metadata(coords, layout, rank, *of, ranks_per_node=nodes)

    def moves(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int, shape: MixerShape
    ) -> Moves:
        assert isinstance(mixer, CompressedSparseAttention)
        assert isinstance(shape, SparseShape)
        self.check(mixer, layout)
        if isinstance(layout, Contiguous | HeadTail):
            return sparse_moves(mixer, layout, rank, shape, self.ranks_per_node)
        if issubclass(layout.kind, DocumentBalanced):
            return pieces_moved(mixer, coords, layout, rank, shape, self.ranks_per_node)
        inside = _inside(layout)
        there = RelayoutMetadata.between(layout, inside, rank)
        moves = sparse_moves(mixer, inside, rank, shape, self.ranks_per_node)
        return relayouts_moved(mixer, there, rank, shape) + moves

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.check_one_axis(device_mesh)
        return super()._apply(module, device_mesh)


def _inside(layout: SequenceLayout) -> SequenceLayout:
    """HeadTail, or Contiguous where the rows do not divide into its chunks."""
    n = layout.num_shards
    kind = Contiguous if layout.seq_len % HeadTail.multiple(n) else HeadTail
    return kind(layout.seq_len, n)


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
