"""Attention to picked tokens over a mesh axis: latents and the indexer's keys travel, no more.

What a query may pick from is known before anything moves: its document up to itself. So a rank
receives the latents and index keys of just those tokens that any of its queries may read, in any
layout: nothing of a document that others hold, or that lies ahead. What is picked is not known on
the host, so all of these are brought.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.moves import Moved, Moves
from dtcp.mixer import ClaimedMixer, Mixer
from dtcp.sequence.coords import Coords
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.masks import Causal
from dtcp.sequence.row_layouts import RowLayouts, in_line
from dtcp.softmax.gathered_rows import gathered_moves
from dtcp.softmax.metadata import all_gather_metadata
from dtcp.softmax.moves import AttentionShape
from dtcp.sparse_latent.blocks import BlocksInSight
from dtcp.sparse_latent.claimed import (
    BringsTokens,
    ContextParallelIndexer,
    ContextParallelPooledIndexer,
    ContextParallelSparseLatent,
)
from dtcp.sparse_latent.metadata import ExchangedTokens
from dtcp.sparse_latent.mixer import LightningIndexer, SparseLatentAttention, TokenReader
from dtcp.sparse_latent.pooled import PooledIndexer
from dtcp.style import ALL_LAYOUTS, MixerShape, MixerStyle


@dataclass(frozen=True)
class SparseLatentShape(MixerShape):
    """Sizes of a call: what its traffic depends on, beside the batch.

    Args:
        latent: channels of a latent and its rotary key, C + R.
        index_dim: channels of what an indexer brings of a token: its key's, and its gate's where
            it pools keys.
    """

    batch: int
    latent: int
    index_dim: int
    element_size: int


@dataclass
class PickedTokensCP(MixerStyle):
    """The base of styles that bring what queries may pick from: their document up to themselves.

    Keyword Args:
        reduce_dtype: in which gradients of what is brought are summed, as of AttentionStyle: with
            torch.float32 what is brought is fp32, too, and plain torch computes.
        ranks_per_node: as of AllGatherAttention: a token crosses to each node that reads it once,
            and is spread inside; its gradients are summed inside a node and go home once.
    """

    layouts: ClassVar[tuple[type[SequenceLayout], ...]] = ALL_LAYOUTS
    summed: ClassVar[str]
    """What has gradients, in words."""
    reduce_dtype: torch.dtype | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduce_dtype not in (None, torch.float32):
            raise ValueError(
                f"{type(self).__name__} sums gradients of {self.summed} in the model's dtype or in "
                f"fp32, got reduce_dtype={self.reduce_dtype!r}: give it None or torch.float32."
            )

    def tokens_in_sight(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> tuple[ExchangedTokens, KeyIntervals]:
        """What is brought, and what tokens see, on the line of all rows where layouts are of it."""
        self.check(mixer, layout)
        intervals = KeyIntervals.of(Causal(), coords)
        on_line = isinstance(layout, RowLayouts)
        if on_line:
            layout, intervals = in_line(layout, intervals)
        nodes = self.ranks_per_node
        exchange = all_gather_metadata(layout, rank, intervals, ranks_per_node=nodes)
        return ExchangedTokens.of(exchange, layout, rank, in_line=on_line), intervals

    def sums_wide(self, num_ranks: int) -> bool:
        """Whether what so many ranks computed of one token is summed unrounded."""
        return self.reduce_dtype is not None and num_ranks > 1

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.check_one_axis(device_mesh)
        claimed = super()._apply(module, device_mesh)
        if isinstance(claimed, BringsTokens) and claimed.has_gradients:
            claimed.wide = self.sums_wide(device_mesh.size())
        return claimed


@dataclass
class SparseLatentCP(PickedTokensCP):
    """Carry out indexers of tokens or pools and SparseLatentAttention on a sharded sequence.

    Each brings what it reads of tokens in one exchange: an indexer its keys, which have no
    gradient, and attention latents with rotary keys, whose gradients are summed and go home in
    another. Keys of pools are made where they are read: raw ones travel, and gates. What was
    brought is kept for backward: K rows of one head, beside L rows of every head of q. HeadTail
    balances an indexer, whose work grows with the position; on PerDocument, BlockBalanced and
    DocumentBalanced nothing of other ranks' documents travels either.

    Keyword Args:
        reduce_dtype: in which gradients of latents are summed, as of AttentionStyle: with
            torch.float32 what is brought is fp32, too, and plain torch computes.
        ranks_per_node: as of AllGatherAttention: a token crosses to each node that reads it once,
            and is spread inside; its gradients are summed inside a node and go home once.

    Where tp splits heads, q, up and out are of this rank's, and each rank has its heads' share of
    the gradients of `latent` and `key_rotary`: AllReduceInputGrad on the modules that make these
    sums the shares.

    Traffic per rank, received, with K_r tokens in sight that others hold: B * K_r * index_dim
    elements of the indexer, and B * K_r * (C + R) of attention; backward the gradients of the
    latter, from each rank that read a token.
    """

    claims: ClassVar[Mapping[type[Mixer], type[ClaimedMixer]]] = {
        LightningIndexer: ContextParallelIndexer,
        PooledIndexer: ContextParallelPooledIndexer,
        SparseLatentAttention: ContextParallelSparseLatent,
    }
    summed: ClassVar[str] = "latents"

    def make_metadata(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> ExchangedTokens | BlocksInSight:
        assert isinstance(mixer, TokenReader)
        tokens, intervals = self.tokens_in_sight(mixer, coords, layout, rank)
        return mixer.pools_of(tokens, intervals) if isinstance(mixer, PooledIndexer) else tokens

    def moves(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int, shape: MixerShape
    ) -> Moves:
        assert isinstance(shape, SparseLatentShape)
        metadata, _ = self.tokens_in_sight(mixer, coords, layout, rank)
        batch = 1 if metadata.in_line else shape.batch
        indexes = isinstance(mixer, LightningIndexer | PooledIndexer)
        width = shape.index_dim if indexes else shape.latent
        row = AttentionShape(batch, 1, 1, width, 0, shape.element_size)
        wide = self.sums_wide(layout.num_shards) and not indexes
        moves = gathered_moves(metadata.exchange, replace(row, wide=wide), rank)
        if not indexes:
            return moves
        return Moves(moves.forward, Moved.alike(0, layout.num_shards, rank))

    def check_one_axis(self, mesh: DeviceMesh) -> None:
        if mesh.ndim != 1:
            raise ValueError(
                f"{self} is applied on the axis of the sequence, got a mesh of {mesh.ndim} axes: "
                f"slice it, as in mesh['cp'], and where tp splits heads give AllReduceInputGrad() "
                f"on tp to the modules that make `latent` and `key_rotary`, which all heads read."
            )
