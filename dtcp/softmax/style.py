"""Styles: how a mixer is carried out over a mesh axis; plans: which style for which mixer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.compile import (
    Boundary,
    EagerIsland,
    InGraph,
    island,
)
from dtcp.distributed.collectives import connect, group_name
from dtcp.distributed.dtensor_rules import HEADS, SEQ
from dtcp.kernels.rotary import rotate
from dtcp.mixer import BatchMetadata, check_position_ids
from dtcp.sequence.layout import (
    BlockBalanced,
    Contiguous,
    HeadTail,
    PerDocument,
    SequenceLayout,
)
from dtcp.sequence.masks import Coords, Mask
from dtcp.softmax.dtensor import install
from dtcp.softmax.mixer import KeysFromValues, MaskedMixer, SoftmaxAttention
from dtcp.softmax.op import AttentionOp
from dtcp.softmax.values_op import ValuesOp


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention call: what its traffic depends on, beside layout and mask."""

    batch: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    element_size: int

    @property
    def key_row(self) -> int:
        """Bytes of one token's K and V."""
        return self.batch * self.kv_heads * (self.key_dim + self.value_dim) * self.element_size


@dataclass(frozen=True)
class Received:
    """Bytes that one rank receives from others, in a forward and in a backward pass."""

    forward: int
    backward: int

    def __add__(self, other: "Received") -> "Received":
        return Received(self.forward + other.forward, self.backward + other.backward)


@dataclass
class AttentionStyle(ParallelStyle):
    """Carry out SoftmaxAttention on a sequence sharded over a mesh axis.

    A strategy names the layouts it accepts, works out once a batch what each rank needs
    (`make_metadata`: data, no communication), and moves and computes in one op. Applied to the
    1-D axis of the sequence, or to a 2-D mesh of the sequence's and the heads' axes.
    """

    layouts: ClassVar[tuple[type[SequenceLayout], ...]] = (
        Contiguous,
        HeadTail,
        PerDocument,
        BlockBalanced,
    )
    boundary: Boundary = field(default_factory=InGraph, kw_only=True)

    @property
    def op(self) -> AttentionOp:
        """The pair of ops that carries this strategy out."""
        raise NotImplementedError

    def check(self, mask: Mask, layout: SequenceLayout) -> None:
        """Refuse what this strategy cannot honour, when the batch is built."""
        if not isinstance(layout, self.layouts):
            accepted = ", ".join(kind.__name__ for kind in self.layouts)
            raise ValueError(
                f"{self} works on the layouts {accepted}, got layout={layout}: use one of them, "
                f"or another strategy."
            )

    def make_metadata(
        self, layout: SequenceLayout, rank: int, intervals: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, ...]:
        """What the op reads on `rank`: host data, of the same shapes on every rank and batch."""
        raise NotImplementedError

    def received(
        self,
        layout: SequenceLayout,
        rank: int,
        intervals: tuple[Tensor, Tensor],
        shape: AttentionShape,
    ) -> Received:
        """What `rank` will receive: a formula, to plan with; tests hold the op's count to it."""
        raise NotImplementedError

    def collect_metadata(
        self, mask: Mask, coords: Coords, layout: SequenceLayout, rank: int
    ) -> tuple[Tensor, ...]:
        self.check(mask, layout)
        return self.make_metadata(layout, rank, mask.intervals(coords))

    @property
    def values_op(self) -> ValuesOp | None:
        """The pair of ops for keys made from values; None: values alone are not carried."""
        return None

    def check_values(self) -> None:
        """Refuse, when the plan is applied, what does not carry values alone."""
        if self.values_op is None:
            raise ValueError(
                f"Keys made from values are made again where values arrive, by RingAttention or "
                f"AllGatherAttention, got {self}: use one of these."
            )

    def value_only_metadata(
        self, mask: Mask, coords: Coords, layout: SequenceLayout, rank: int
    ) -> tuple[Tensor, ...]:
        """The same for keys made from values, and the positions of queries and of keys."""
        raise NotImplementedError

    def groups(self, axis: DeviceMesh) -> list[str]:
        """Names of the process groups the op talks over; the axis's own first."""
        return [group_name(axis)]

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) not in (SoftmaxAttention, KeysFromValues):
            raise TypeError(
                f"{self} takes over an unclaimed SoftmaxAttention or KeysFromValues, got a "
                f"{type(module).__name__}: name the mixer itself in the plan."
            )
        eager = isinstance(self.boundary, EagerIsland)
        if type(module) is KeysFromValues:
            self.check_values()
            module.__class__ = _IslandValues if eager else ContextParallelValues
        else:
            install(self.op)
            module.__class__ = _IslandAttention if eager else ContextParallelAttention
        cast(ContextParallelMixer, module).claim(self, device_mesh)
        return module


class ContextParallelMixer(MaskedMixer):
    """A mixer that a style has taken over. Made by the style, never built directly."""

    def claim(self, style: AttentionStyle, mesh: DeviceMesh) -> None:
        if mesh.ndim > 2:
            raise ValueError(
                f"{style} is applied on the axis of the sequence, or on it and the heads' axis, "
                f"got a mesh of {mesh.ndim} axes: {mesh}. Slice it: mesh['cp', 'tp']."
            )
        names = mesh.mesh_dim_names
        axis = mesh if mesh.ndim == 1 or names is None else mesh[names[0]]
        self.style = style
        self.mesh = mesh
        self.rank, self.num_shards = axis.get_local_rank(), axis.size()
        self.groups = style.groups(axis)
        for name in self.groups:
            connect(name)
        self.placements: tuple[Placement, ...] = (Shard(SEQ), Shard(HEADS))[: mesh.ndim]
        self.metadata_key = self.key_of(f"{self.mask} by {style}")

    def make_metadata(self, coords: Coords, layout: SequenceLayout | None) -> Sequence[Tensor]:
        if layout is None or layout.num_shards != self.num_shards:
            raise ValueError(
                f"A mixer on {self.num_shards} ranks needs a layout of as many shards, got "
                f"layout={layout}: build the batch with shard_batch on the mesh of the plan."
            )
        return self.rank_metadata_of(coords, layout)

    def rank_metadata_of(self, coords: Coords, layout: SequenceLayout) -> Sequence[Tensor]:
        """This rank's tables of whole rows."""
        return self.style.collect_metadata(self.mask, coords, layout, self.rank)

    def own(self, metadata: BatchMetadata) -> Sequence[Tensor]:
        """This mixer's tables among those of a batch."""
        if metadata is None or self.metadata_key not in metadata:
            raise ValueError(
                f"A context-parallel mixer reads the tables of its batch, got none for "
                f"{self.metadata_key!r}: pass ShardedBatch.tables of shard_batch(..., model=model)."
            )
        return metadata[self.metadata_key]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, style={self.style}, ranks={self.num_shards}"


class ContextParallelAttention(ContextParallelMixer, SoftmaxAttention):
    """A SoftmaxAttention that a style has taken over."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        metadata: BatchMetadata,
        *,
        sink: Tensor | None = None,
    ) -> Tensor:
        return self.attend(q, k, v, self.own(metadata), sink)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, metadata: Sequence[Tensor], sink: Tensor | None
    ) -> Tensor:
        """Local shards in, local shard out; DTensors in, DTensor out.

        The op's rule checks their placements (dispatch.py), not traced code.
        """
        given = any(isinstance(x, DTensor) for x in (q, k, v))
        if not given:
            q, k, v = (self._wrap(x) for x in (q, k, v))
        softmax = self.softmax(q)
        out = self.style.op(q, k, v, metadata, softmax, groups=self.groups, sink=sink)
        return out if given else cast(DTensor, out).to_local(grad_placements=self.placements)

    def _wrap(self, x: Tensor) -> DTensor:
        return DTensor.from_local(x, self.mesh, self.placements, run_check=False)


class _IslandAttention(ContextParallelAttention):
    """The same behind an eager island."""

    @island
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        metadata: BatchMetadata,
        *,
        sink: Tensor | None = None,
    ) -> Tensor:
        return self.attend(q, k, v, self.own(metadata), sink)


class ContextParallelValues(ContextParallelMixer, KeysFromValues):
    """A KeysFromValues that a style has taken over; takes local shards alone."""

    def forward(
        self,
        q: Tensor,
        v: Tensor,
        position_ids: Tensor,
        key_scale: Tensor,
        frequency: Tensor,
        metadata: BatchMetadata,
    ) -> Tensor:
        return self.attend(q, v, position_ids, key_scale, frequency, self.own(metadata))

    def attend(
        self,
        q: Tensor,
        v: Tensor,
        position_ids: Tensor,
        key_scale: Tensor,
        frequency: Tensor,
        metadata: Sequence[Tensor],
    ) -> Tensor:
        *read, known, key_token_index = metadata
        check_position_ids(position_ids, known, read[1] >= read[0])
        q = rotate(q, known, frequency)
        op = self.style.values_op
        assert op is not None
        return op(
            q,
            v,
            key_scale,
            frequency,
            (*read, key_token_index),
            self.softmax(q),
            groups=self.groups,
        )

    def rank_metadata_of(self, coords: Coords, layout: SequenceLayout) -> Sequence[Tensor]:
        return self.style.value_only_metadata(self.mask, coords, layout, self.rank)


class _IslandValues(ContextParallelValues):
    """The same behind an eager island."""

    @island
    def forward(
        self,
        q: Tensor,
        v: Tensor,
        position_ids: Tensor,
        key_scale: Tensor,
        frequency: Tensor,
        metadata: BatchMetadata,
    ) -> Tensor:
        return self.attend(q, v, position_ids, key_scale, frequency, self.own(metadata))


__all__ = [
    "AttentionStyle",
    "Boundary",
    "ContextParallelAttention",
    "ContextParallelMixer",
]
