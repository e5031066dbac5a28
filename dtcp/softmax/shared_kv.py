"""Keys gathered once for several layers: exchanged where they are made, and kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from dtcp.distributed.moves import NOTHING, Moves
from dtcp.kernels.softmax.block_ranges import UNUSED
from dtcp.metadata import BatchMetadata
from dtcp.mixer import ClaimedMixer, Mixer
from dtcp.mixer_positions import check_position_ids
from dtcp.sequence.arguments import check_kind
from dtcp.sequence.coords import Coords
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.all_gather import AllGatherAttention
from dtcp.softmax.gathered_rows import gather_rows, gathered_moves
from dtcp.softmax.inputs import AttentionInputs
from dtcp.softmax.local import ATTENTION
from dtcp.softmax.metadata import KeyExchangeMetadata, LocalMetadata
from dtcp.softmax.mixer import GatherSharedKV, MaskedMixer, SoftmaxAttention
from dtcp.softmax.moves import AttentionShape
from dtcp.softmax.op import AttentionOp
from dtcp.softmax.positions import TokenPositions
from dtcp.softmax.style import AttentionStyle
from dtcp.style import MixerShape


class ContextParallelGatherSharedKV(ClaimedMixer, GatherSharedKV):
    """A GatherSharedKV that a style has taken over."""

    def carry_out(self, x: Tensor, attn_metadata: BatchMetadata) -> Tensor:
        metadata: KeyExchangeMetadata = self.own(attn_metadata)
        line = x.flatten(0, 1)[None] if metadata.in_line else x
        out: Tensor = gather_rows(line, metadata.tensors(), self.groups[-1], x.dtype, self.wide)
        return out.view(x.shape[0], -1, *x.shape[2:])

    def position_ids(self, position_ids: Tensor, attn_metadata: BatchMetadata) -> Tensor:
        metadata: KeyExchangeMetadata = self.own(attn_metadata)
        check_position_ids(position_ids, metadata.position_ids, metadata.sees)
        rows = metadata.position_ids.shape[0]
        # On a line, what all rows require follows one another; it has as many places as rows do.
        return metadata.key_position_ids[0].reshape(rows, -1)


class AttentionToSharedKV(ClaimedMixer, SoftmaxAttention):
    """A SoftmaxAttention whose keys a GatherSharedKV has gathered; moves nothing."""

    carry_out = SoftmaxAttention.forward

    def attend(self, x: AttentionInputs, metadata: KeyExchangeMetadata) -> Tensor:
        local = LocalMetadata(
            first_key=metadata.first_key,
            last_key=metadata.last_key,
            key_token_index=metadata.key_token_index[0],
            block_ranges=metadata.block_ranges[0],
            pieces=metadata.pieces[0],
            query_token_index=metadata.query_token_index,
            in_line=metadata.in_line,
        )
        return ATTENTION(x, local, self.softmax(x.q), keys_sum_grads=self.wide)


@dataclass
class SharedKVAttention(AttentionStyle):
    """Carry out a GatherSharedKV, and every SoftmaxAttention that attends to what it gathers.

    Keys cross once for all the layers that share them, and their gradients are summed on the
    rank that used them before they go home, once as well. What was gathered is kept from the
    first of these layers to the end of the backward pass: that is the price.

    Args:
        gather: how keys are brought; decides which.

    Keyword Args:
        reduce_dtype: of gradients of keys, as of AttentionStyle: with torch.float32 what is
            gathered is fp32, too, so that the layers' gradients of it are summed unrounded; in
            bf16 that doubles what is kept.
        ranks_per_node: as of AllGatherAttention.

    Traffic per rank, received: keys required from others x B * G * W elements forward, in the
    exchange; their gradients home backward. Attention itself moves nothing.
    """

    claims: ClassVar[Mapping[type[Mixer], type[ClaimedMixer]]] = {
        GatherSharedKV: ContextParallelGatherSharedKV,
        SoftmaxAttention: AttentionToSharedKV,
    }

    gather: AllGatherAttention = field(default_factory=AllGatherAttention)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind("SharedKVAttention", AllGatherAttention, gather=self.gather)
        self.check_part(self.gather)
        if self.ranks_per_node and self.gather.ranks_per_node not in (0, self.ranks_per_node):
            raise ValueError(
                f"Keys are brought over the nodes of one axis, got ranks_per_node="
                f"{self.ranks_per_node} and {self.gather.ranks_per_node} in gather: give one."
            )
        # Those of the one that brings keys, where this style is given none.
        self.ranks_per_node = self.ranks_per_node or self.gather.ranks_per_node

    @property
    def op(self) -> AttentionOp:
        return ATTENTION

    def check(self, mixer: Mixer, layout: SequenceLayout) -> None:
        self.gather.check(mixer, layout)

    def check_in_graph(self, name: str) -> None:
        raise ValueError(
            f"{name} gathers the keys of its own call, got style={self}, whose keys a "
            f"GatherSharedKV of the model gathers: give it {type(self.gather).__name__}."
        )

    def make_metadata(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> KeyExchangeMetadata:
        assert isinstance(mixer, MaskedMixer)
        self.check(mixer, layout)
        metadata = self.batch_metadata(layout, rank, KeyIntervals.of(mixer.mask, coords))
        assert isinstance(metadata, KeyExchangeMetadata)
        metadata = metadata.with_position_ids(TokenPositions.of(coords), layout, rank)
        # Models rotate as many keys as there is room for.
        (count,) = metadata.key_counts
        metadata.key_position_ids[..., count:] = 0
        return metadata

    def rank_metadata(
        self, layout: SequenceLayout, rank: int, intervals: KeyIntervals
    ) -> KeyExchangeMetadata:
        gather = replace(self.gather, ranks_per_node=self.ranks_per_node, tile=self.tile)
        metadata = gather.rank_metadata(layout, rank, intervals)
        # Kernels are called with as many keys as there is room for.
        (count,) = metadata.key_counts
        metadata.key_token_index[:, count:] = UNUSED
        return metadata

    def moves(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int, shape: MixerShape
    ) -> Moves:
        """Of the exchange; its shape has as key and value dim what a gathered row comes to."""
        assert isinstance(shape, AttentionShape)
        if not isinstance(mixer, GatherSharedKV):
            return NOTHING
        metadata = self.make_metadata(mixer, coords, layout, rank)
        batch = 1 if metadata.in_line else shape.batch
        shape = replace(shape, batch=batch, wide=self.sums_wide(layout.num_shards))
        return gathered_moves(metadata, shape, rank)
