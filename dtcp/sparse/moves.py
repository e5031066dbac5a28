"""What compressed sparse attention moves between ranks, by formula."""

from dataclasses import dataclass, replace

from dtcp.distributed.moves import NOTHING, Moved, Moves
from dtcp.distributed.node_collectives import gathered_on_nodes
from dtcp.distributed.relayout import RelayoutMetadata, relayout_moved
from dtcp.sequence.coords import Coords, documents_of
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.stretches import Stretches, left_routes
from dtcp.sparse.entries import EntryRuns, entry_routes
from dtcp.sparse.exchange import halo_routes, left_moved, stacked
from dtcp.sparse.metadata import segment_entries
from dtcp.sparse.mixer import CompressedSparseAttention
from dtcp.style import MixerShape


@dataclass(frozen=True)
class SparseShape(MixerShape):
    """Sizes of a call: what its traffic depends on, beside layout and mixer.

    Args:
        heads, index_heads: read where operands move to another layout, and else not.
    """

    batch: int
    head_dim: int
    index_head_dim: int
    element_size: int
    heads: int = 1
    index_heads: int = 0

    @property
    def row(self) -> int:
        """Bytes of a channel of one token in all rows."""
        return self.batch * self.element_size


def sparse_moves(
    mixer: CompressedSparseAttention,
    layout: SequenceLayout,
    rank: int,
    shape: SparseShape,
    ranks_per_node: int = 0,
) -> Moves:
    """Halos of keys and of tokens to pool, the entries of all ranks and the indexer's keys."""
    n, compression, keys = layout.num_shards, mixer.compression, shape.head_dim
    if compression is None:
        reaches, tokens = [mixer.window - 1], [keys]
        entries = Moves(Moved.alike(0, n, rank), Moved.alike(0, n, rank))
    else:
        reaches = [mixer.window - 1, compression.reach]
        index = shape.index_head_dim if compression.selected is not None else 0
        tokens = [keys, _pooled_width(mixer, shape)]
        rows = len(layout.segments(rank)) * segment_entries(layout.segment_len, compression)
        size = rows * shape.row
        there, back = (
            replace(gathered_on_nodes(size * width, n, rank, ranks_per_node), workspace=0)
            for width in (keys + index, keys)
        )
        entries = Moves(there, back)
    routes = halo_routes(layout, rank, reaches, ranks_per_node)
    there, back = (
        left_moved(routes, [shape.row * width for width in tokens], n, rank, reverse=reverse)
        for reverse in (False, True)
    )
    return Moves(there, back) + entries


def pieces_moved(
    mixer: CompressedSparseAttention,
    coords: Coords,
    layout: SequenceLayout,
    rank: int,
    shape: SparseShape,
    ranks_per_node: int = 0,
) -> Moves:
    """Halos at cuts inside documents, and entries to the ranks that read them."""
    n, compression, size = layout.num_shards, mixer.compression, shape.element_size
    stretches = Stretches.of(layout, documents_of(coords))
    halos, moves = [(mixer.window - 1, shape.head_dim)], NOTHING
    if compression is not None:
        halos.append((compression.reach, _pooled_width(mixer, shape)))
        index = shape.index_head_dim if compression.selected is not None else 0
        runs = EntryRuns.of(stretches, compression.ratio)
        routes_of_entries, _ = entry_routes(runs, rank, num_ranks=n, ranks_per_node=ranks_per_node)
        routes, keys = stacked([routes_of_entries]), shape.head_dim
        moves = Moves(
            left_moved(routes, [(keys + index) * size], n, rank),
            left_moved(routes, [keys * size], n, rank, reverse=True),
        )
    for reach, width in halos:
        routes = stacked([left_routes(stretches, reach, rank, ranks_per_node)])
        there_and_back = (
            left_moved(routes, [width * size], n, rank, reverse=reverse)
            for reverse in (False, True)
        )
        moves += Moves(*there_and_back)
    return moves


def relayouts_moved(
    mixer: CompressedSparseAttention, there: RelayoutMetadata, rank: int, shape: SparseShape
) -> Moves:
    """The operands to the layout inside, all in one dtype, and the output back."""
    width = (shape.heads + 1) * shape.head_dim
    if mixer.compression is not None:
        width += _pooled_width(mixer, shape)
        if mixer.compression.selected is not None:
            width += shape.index_heads * (shape.index_head_dim + 1)
    row = shape.element_size if there.in_line else shape.row
    operands, out = width * row, shape.heads * shape.head_dim * row
    counts = there.counts
    return Moves(
        relayout_moved(counts, operands, rank) + relayout_moved(counts, out, rank, reverse=True),
        relayout_moved(counts, operands, rank, reverse=True) + relayout_moved(counts, out, rank),
    )


def _pooled_width(mixer: CompressedSparseAttention, shape: SparseShape) -> int:
    """Channels of a token that is pooled: value and gate, for entries and for the indexer."""
    compression = mixer.compression
    assert compression is not None
    index = shape.index_head_dim if compression.selected is not None else 0
    return 2 * (2 if compression.overlap else 1) * (shape.head_dim + index)
