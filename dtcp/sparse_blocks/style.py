"""Attention to picked blocks over a mesh axis: keys and values of the tokens in sight travel.

Which tokens a rank's queries may pick is known before anything moves, which they do pick is not. So
raw index keys of all of them come first, blocks are made of these and picked where they are read,
and keys and values come in one more exchange, by the same routes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dtcp.distributed.moves import Moved, Moves
from dtcp.mixer import ClaimedMixer, Mixer
from dtcp.sequence.coords import Coords
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.gathered_rows import gathered_moves
from dtcp.softmax.moves import AttentionShape
from dtcp.sparse_blocks.claimed import ContextParallelScoredBlocks, ContextParallelSparseBlocks
from dtcp.sparse_blocks.mixer import SparseBlockAttention
from dtcp.sparse_blocks.scored import ScoredBlockAttention
from dtcp.sparse_latent.blocks import BlocksInSight
from dtcp.sparse_latent.style import PickedTokensCP
from dtcp.style import MixerShape


@dataclass(frozen=True)
class SparseBlockShape(MixerShape):
    """Sizes of a call: what its traffic depends on, beside the batch.

    Args:
        kv_heads: G, those that are read here.
        key_dim, value_dim: D and V.
        index_dim: channels of an index key and of the table beside it, if there is one.
    """

    batch: int
    kv_heads: int
    key_dim: int
    value_dim: int
    index_dim: int
    element_size: int


@dataclass
class SparseBlockCP(PickedTokensCP):
    """Carry out SparseBlockAttention and ScoredBlockAttention on a sharded sequence.

    Index keys travel as they are, before anything is pooled: of what travels they are the smaller
    part, and blocks, which start and end anywhere on a shard, are whole where they are read. What
    was brought of keys and values is kept for backward. HeadTail balances the indexer, whose work
    grows with the position; on PerDocument, BlockBalanced and DocumentBalanced nothing of other
    ranks' documents travels either. Where tp splits heads, q, k and v are of this rank's.

    Keyword Args:
        reduce_dtype: in which gradients of keys and values are summed, as of AttentionStyle: with
            torch.float32 what is brought is fp32, too, and plain torch computes.
        ranks_per_node: as of AllGatherAttention: a token crosses to each node that reads it once,
            and is spread inside; its gradients are summed inside a node and go home once.

    Traffic per rank, received, with K_r tokens in sight that others hold: B * K_r * index_dim
    elements of the indexer, and B * K_r * G * (D + V) of attention; backward the gradients of the
    latter, from each rank that read a token.
    """

    claims: ClassVar[Mapping[type[Mixer], type[ClaimedMixer]]] = {
        SparseBlockAttention: ContextParallelSparseBlocks,
        ScoredBlockAttention: ContextParallelScoredBlocks,
    }
    summed: ClassVar[str] = "keys and values"

    def make_metadata(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> BlocksInSight:
        assert isinstance(mixer, SparseBlockAttention)
        return mixer.blocks_of(*self.tokens_in_sight(mixer, coords, layout, rank))

    def moves(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int, shape: MixerShape
    ) -> Moves:
        assert isinstance(shape, SparseBlockShape)
        tokens, _ = self.tokens_in_sight(mixer, coords, layout, rank)
        batch, n = 1 if tokens.in_line else shape.batch, layout.num_shards
        heads, size = shape.kv_heads, shape.element_size
        index = AttentionShape(batch, 1, 1, shape.index_dim, 0, size)
        kv = AttentionShape(
            batch, heads, heads, shape.key_dim, shape.value_dim, size, wide=self.sums_wide(n)
        )
        picking = gathered_moves(tokens.exchange, index, rank).forward
        return Moves(picking, Moved.alike(0, n, rank)) + gathered_moves(tokens.exchange, kv, rank)
