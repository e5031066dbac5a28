"""Styles of softmax attention, and what a mixer becomes once one has taken it over."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from dtcp.distributed.dtensor_rules import HEADS, SEQ
from dtcp.distributed.moves import Moves
from dtcp.kernels.rotary import rotate
from dtcp.kernels.softmax.backends import check_kernel_name
from dtcp.kernels.softmax.block_ranges import TILE
from dtcp.kernels.softmax.types import AUTO
from dtcp.metadata import AttentionMetadata, BatchMetadata
from dtcp.mixer import ClaimedMixer, Mixer, check_position_ids, position_ids_of
from dtcp.sequence.arguments import check_ints, check_tensor
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.interval_runs import Intervals, KeyIntervals
from dtcp.sequence.layout import BlockBalanced, Contiguous, HeadTail, PerDocument, SequenceLayout
from dtcp.sequence.row_layouts import RowLayouts
from dtcp.softmax.dtensor import install_attention_rules
from dtcp.softmax.metadata import KeyExchangeMetadata
from dtcp.softmax.mixer import KeysFromValues, MaskedMixer, SoftmaxAttention
from dtcp.softmax.moves import AttentionShape, Peers
from dtcp.softmax.op import AttentionInputs, AttentionOp
from dtcp.style import MixerShape, MixerStyle


class ContextParallelAttention(ClaimedMixer, SoftmaxAttention):
    """A SoftmaxAttention that a style has taken over."""

    def carry_out(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_metadata: BatchMetadata,
        *,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Local shards in, local shard out; DTensors in, DTensor out.

        The op's rule checks their placements (dtensor.py), not traced code.
        """
        check_tensor("Attention", shape="[B, L, heads, width]", q=q, k=k, v=v)
        metadata, softmax = self.own(attn_metadata), self.softmax(q)
        distributed = any(isinstance(x, DTensor) for x in (q, k, v))
        if not distributed:
            q, k, v = (self._wrap(x) for x in (q, k, v))
        x = AttentionInputs(q, k, v, sink)
        out = self.style.op(x, metadata, softmax, groups=self.groups)
        if distributed:
            return cast(Tensor, out)
        return cast(DTensor, out).to_local(grad_placements=self._placements())

    def _wrap(self, x: Tensor) -> DTensor:
        return DTensor.from_local(x, self.mesh, self._placements(), run_check=False)

    def _placements(self) -> tuple[Placement, ...]:
        return (Shard(SEQ), Shard(HEADS))[: self.mesh.ndim]


class ContextParallelKeysFromValues(ClaimedMixer, KeysFromValues):
    """A KeysFromValues that a style has taken over; takes local shards alone."""

    def carry_out(
        self,
        q: Tensor,
        v: Tensor,
        position_ids: Tensor,
        key_scale: Tensor,
        frequency: Tensor,
        attn_metadata: BatchMetadata,
    ) -> Tensor:
        self.check_operands(q, v, position_ids, key_scale, frequency)
        metadata: KeyExchangeMetadata = self.own(attn_metadata)
        check_position_ids(position_ids, metadata.position_ids, metadata.sees)
        q = rotate(q, metadata.position_ids, frequency)
        x = AttentionInputs(q, None, v, None, key_scale, frequency)
        out: Tensor = self.style.op(x, metadata, self.softmax(q), groups=self.groups)
        return out


@dataclass
class AttentionStyle(MixerStyle):
    """Carry out softmax attention on a sequence sharded over a mesh axis.

    A strategy names the layouts it accepts, works out once per batch what each rank requires
    (`rank_metadata`: data, no communication), and moves and computes in one op. Applied to the
    1-D axis of the sequence, or to a 2-D mesh of the sequence's and the heads' axes.

    Keyword Args:
        boundary: InGraph() or EagerIsland().
        tile: queries for which the host works out one range of keys.
        kernel: the backend that computes it (`python -m dtcp.kernels` lists them); by default the
            mixer's own choice.
    """

    claims: ClassVar[Mapping[type[Mixer], type[ClaimedMixer]]] = {
        SoftmaxAttention: ContextParallelAttention,
        KeysFromValues: ContextParallelKeysFromValues,
    }
    layouts: ClassVar[tuple[type[SequenceLayout], ...]] = (
        Contiguous,
        HeadTail,
        PerDocument,
        BlockBalanced,
        DocumentBalanced,
    )
    tile: int = field(default=TILE, kw_only=True)
    kernel: str = field(default=AUTO, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ints(type(self).__name__, least=1, tile=self.tile)

    @property
    def op(self) -> AttentionOp:
        """The pair of ops that carries this strategy out."""
        raise NotImplementedError

    def make_metadata(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> AttentionMetadata:
        assert isinstance(mixer, MaskedMixer)
        self.check(mixer, layout)
        metadata = self.batch_metadata(layout, rank, KeyIntervals.of(mixer.mask, coords))
        if not isinstance(mixer, KeysFromValues):
            return metadata
        assert isinstance(metadata, KeyExchangeMetadata)
        return metadata.with_position_ids(position_ids_of(coords), layout, rank)

    def batch_metadata(
        self, layout: SequenceLayout, rank: int, intervals: KeyIntervals
    ) -> AttentionMetadata:
        """`rank_metadata`, of rows that are laid out each by itself as well."""
        if not isinstance(layout, RowLayouts):
            return self.rank_metadata(layout, rank, intervals)
        metadata = self.rank_metadata(layout.in_line, rank, intervals.in_line())
        return replace(metadata, in_line=True)

    def rank_metadata(
        self, layout: SequenceLayout, rank: int, intervals: Intervals
    ) -> AttentionMetadata:
        """What the op reads on `rank`, for a mask's intervals of the whole rows."""
        raise NotImplementedError

    def peers(self, num_ranks: int, rank: int) -> Peers:
        """The ranks of the axis, as this strategy groups them."""
        return Peers(num_ranks, rank, num_ranks)

    def moves(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int, shape: MixerShape
    ) -> Moves:
        assert isinstance(shape, AttentionShape)
        metadata, length = self.make_metadata(mixer, coords, layout, rank), layout.shard_len
        shape = replace(shape, values_only=isinstance(mixer, KeysFromValues))
        if metadata.in_line:
            shape, length = replace(shape, batch=1), shape.batch * length
        peers = self.peers(layout.num_shards, rank)
        return self.op.strategy.moves(shape, length, metadata.tensors(), peers)

    def check_values_only(self) -> None:
        """Refuse, when the plan is applied, what does not exchange values alone."""
        if not self.op.strategy.takes_values_only:
            raise ValueError(
                f"Keys made from values are recomputed where values arrive, by RingAttention or "
                f"AllGatherAttention, got {self}: use one of these."
            )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) is KeysFromValues:
            self.check_values_only()
        check_kernel_name(self.kernel)
        install_attention_rules(self.op)
        claimed = super()._apply(module, device_mesh)
        if isinstance(claimed, MaskedMixer) and self.kernel != AUTO:
            claimed.kernel = self.kernel
        return claimed


class KeyExchangeAttention(AttentionStyle):
    """A strategy that brings to each rank the keys its queries require, and no others."""
