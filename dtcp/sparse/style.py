"""Compressed sparse attention over a mesh axis: halos and finished entries travel, no more.

A rank lines its tokens up after those just left of each of its segments, pools the windows that
close in its shard, and gathers what all ranks pooled, or what is left of its own tokens in their
documents. A window's last token decides who pools it, so no length of a document or shard has to
be a multiple of anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.moves import Moves
from dtcp.distributed.relayout import RelayoutMetadata
from dtcp.mixer import ClaimedMixer, Mixer
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sparse.claimed import ContextParallelSparse
from dtcp.sparse.metadata import SparseMetadata, rank_metadata
from dtcp.sparse.mixer import CompressedSparseAttention
from dtcp.sparse.moves import SparseShape, pieces_moved, relayouts_moved, sparse_moves
from dtcp.sparse.pieces import pieces_metadata
from dtcp.sparse.relayout import OwnTokens, RelayoutSparseMetadata
from dtcp.style import ALL_LAYOUTS, MixerShape, MixerStyle


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
    layouts: ClassVar[tuple[type[SequenceLayout], ...]] = ALL_LAYOUTS

    def make_metadata(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> SparseMetadata | RelayoutSparseMetadata:
        assert isinstance(mixer, CompressedSparseAttention)
        self.check(mixer, layout)
        sizes, nodes = (mixer.window, mixer.compression), self.ranks_per_node
        if issubclass(layout.kind, DocumentBalanced):
            return pieces_metadata(coords, layout, rank, *sizes, ranks_per_node=nodes)
        inside = _inside(layout)
        metadata = rank_metadata(coords, inside, rank, *sizes, ranks_per_node=nodes)
        if inside is layout:
            return metadata
        there = RelayoutMetadata.between(layout, inside, rank)
        return RelayoutSparseMetadata(there, OwnTokens.of(coords, layout, rank), metadata)

    def moves(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int, shape: MixerShape
    ) -> Moves:
        assert isinstance(mixer, CompressedSparseAttention)
        assert isinstance(shape, SparseShape)
        self.check(mixer, layout)
        if issubclass(layout.kind, DocumentBalanced):
            return pieces_moved(mixer, coords, layout, rank, shape, self.ranks_per_node)
        inside = _inside(layout)
        moves = sparse_moves(mixer, inside, rank, shape, self.ranks_per_node)
        if inside is layout:
            return moves
        there = RelayoutMetadata.between(layout, inside, rank)
        return relayouts_moved(mixer, there, rank, shape) + moves

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.check_one_axis(device_mesh)
        return super()._apply(module, device_mesh)


def _inside(layout: SequenceLayout) -> SequenceLayout:
    """Itself, or of other pieces HeadTail; Contiguous where rows do not divide into its chunks."""
    if isinstance(layout, Contiguous | HeadTail):
        return layout
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
