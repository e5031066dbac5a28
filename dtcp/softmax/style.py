"""The base of styles of softmax attention."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp.compile import InGraph
from dtcp.distributed.moves import Moves
from dtcp.kernels.softmax.api import SoftmaxParams
from dtcp.kernels.softmax.backends import check_kernel_name, check_unrounded
from dtcp.kernels.softmax.block_ranges import TILE
from dtcp.kernels.softmax.types import AUTO
from dtcp.metadata import AttentionMetadata
from dtcp.mixer import ClaimedMixer, Mixer
from dtcp.sequence.arguments import check_ints
from dtcp.sequence.coords import Coords
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.row_layouts import RowLayouts, in_line
from dtcp.softmax.claimed import (
    ContextParallelAttention,
    ContextParallelCrossAttention,
    ContextParallelKeysFromValues,
    ContextParallelLatentAttention,
)
from dtcp.softmax.dtensor import install_attention_rules
from dtcp.softmax.metadata import KeyExchangeMetadata
from dtcp.softmax.mixer import (
    CrossAttention,
    KeysFromValues,
    LatentAttention,
    MaskedMixer,
    SoftmaxAttention,
)
from dtcp.softmax.moves import AttentionShape, Peers
from dtcp.softmax.op import AttentionOp
from dtcp.softmax.positions import TokenPositions
from dtcp.style import ALL_LAYOUTS, MixerShape, MixerStyle


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
        reduce_dtype: in which ranks sum what each computed of the same key or query, as of FSDP's
            MixedPrecisionPolicy: None for the model's dtype, torch.float32 for sums as exact as
            one device's. Then kernels that round their results are passed over in backward (and
            where a ring or a mask of several intervals merges), and gradients of keys travel in
            fp32 to where they are summed: twice the bytes home in bf16. So do gradients of latents
            over tp, which splits the heads that read them. Nothing changes where nothing is summed:
            on one rank, and where heads are dealt out and no kv head is replicated.
    """

    claims: ClassVar[Mapping[type[Mixer], type[ClaimedMixer]]] = {
        SoftmaxAttention: ContextParallelAttention,
        KeysFromValues: ContextParallelKeysFromValues,
        LatentAttention: ContextParallelLatentAttention,
        CrossAttention: ContextParallelCrossAttention,
    }
    takes_memory: ClassVar[bool] = False
    """Whether keys may be those of another sequence, with a layout of its own."""
    layouts: ClassVar[tuple[type[SequenceLayout], ...]] = ALL_LAYOUTS
    tile: int = field(default=TILE, kw_only=True)
    kernel: str = field(default=AUTO, kw_only=True)
    reduce_dtype: torch.dtype | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ints(type(self).__name__, least=1, tile=self.tile)
        check_kernel_name(self.kernel)
        if self.reduce_dtype not in (None, torch.float32):
            raise ValueError(
                f"{type(self).__name__} sums what ranks computed in the model's dtype or in fp32, "
                f"got reduce_dtype={self.reduce_dtype!r}: give it None or torch.float32."
            )
        if self.reduce_dtype is not None:
            check_unrounded(self.kernel)

    def sums_wide(self, num_ranks: int) -> bool:
        """Whether what so many ranks computed of the same key or query is summed unrounded."""
        return self.reduce_dtype is not None and num_ranks > 1

    def softmax_params(self, num_ranks: int) -> Callable[[float], SoftmaxParams]:
        """What scores become weights by on so many ranks, given their scale."""
        return partial(SoftmaxParams, kernel=self.kernel, wide=self.sums_wide(num_ranks))

    @property
    def op(self) -> AttentionOp:
        """The pair of ops that carries this strategy out."""
        raise NotImplementedError

    def make_metadata(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> AttentionMetadata:
        assert isinstance(mixer, MaskedMixer)
        self.check(mixer, layout)
        intervals = KeyIntervals.of(mixer.mask, coords)
        self.check_memory(mixer, layout, intervals.keys)
        metadata = self.batch_metadata(layout, rank, intervals)
        if not isinstance(mixer, KeysFromValues):
            return metadata
        return self.with_position_ids(metadata, coords, layout, rank)

    def with_position_ids(
        self, metadata: AttentionMetadata, coords: Coords, layout: SequenceLayout, rank: int
    ) -> AttentionMetadata:
        """The same, for keys that are made from values where they arrive."""
        assert isinstance(metadata, KeyExchangeMetadata)
        return metadata.with_position_ids(TokenPositions.of(coords), layout, rank)

    def batch_metadata(
        self, layout: SequenceLayout, rank: int, intervals: KeyIntervals
    ) -> AttentionMetadata:
        """`rank_metadata`, of rows that are laid out each by itself as well."""
        if not any(isinstance(each, RowLayouts) for each in (layout, intervals.keys)):
            return self.rank_metadata(layout, rank, intervals)
        line, intervals = in_line(layout, intervals)
        return replace(self.rank_metadata(line, rank, intervals), in_line=True)

    def rank_metadata(
        self, layout: SequenceLayout, rank: int, intervals: KeyIntervals
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
        values_only, wide = isinstance(mixer, KeysFromValues), self.sums_wide(layout.num_shards)
        shape = replace(shape, values_only=values_only, wide=wide)
        if metadata.in_line:
            shape, length = replace(shape, batch=1), shape.batch * length
        peers = self.peers(layout.num_shards, rank)
        return self.op.strategy.moves(shape, length, metadata, peers)

    def check_part(self, part: "AttentionStyle") -> None:
        """Refuse options of a style inside of this one, which takes the mixers over by itself."""
        plain, name = AttentionStyle(), type(self).__name__
        for option in ("boundary", "tile", "kernel", "reduce_dtype"):
            value = getattr(part, option)
            if value != getattr(plain, option):
                raise ValueError(
                    f"{name} takes mixers over with its own options, got {option}={value!r} of the "
                    f"{type(part).__name__} inside: give it to {name}."
                )

    def check_in_graph(self, name: str) -> None:
        """Refuse a boundary where attention is called by itself, and no mixer leaves the graph."""
        if not isinstance(self.boundary, InGraph):
            raise ValueError(
                f"{name} is one op wherever it is called, got boundary={self.boundary!r}: leave "
                f"it out, or apply the style to a model's mixers by a plan."
            )

    def check_memory(
        self, mixer: Mixer, layout: SequenceLayout, keys: SequenceLayout | None
    ) -> None:
        """Refuse the keys of another sequence that is not sharded on the same axis."""
        if not isinstance(mixer, CrossAttention):
            return
        if keys is None or keys.num_shards != layout.num_shards:
            raise ValueError(
                f"Cross attention on {layout.num_shards} ranks reads a sequence that is sharded "
                f"on as many, got a memory laid out as {keys}: shard it with shard_batch on the "
                f"same mesh, and pass its ShardedBatch."
            )
        self.check(mixer, keys)

    def check_cross(self) -> None:
        """Refuse, when the plan is applied, what brings no keys of another sequence."""
        if not self.takes_memory:
            raise ValueError(
                f"Keys of another sequence lie in no window of this one, got {self} for cross "
                f"attention: use RingAttention, AllGatherAttention or UlyssesAttention."
            )

    def check_values_only(self) -> None:
        """Refuse, when the plan is applied, what brings no values alone."""
        self._check_made(self.op.strategy.takes_values_only)

    def check_latents(self) -> None:
        """Refuse, when the plan is applied, what brings no latents."""
        self._check_made(self.op.strategy.takes_latents)

    def _check_made(self, takes: bool) -> None:
        if not takes:
            raise ValueError(
                f"Keys made of values or latents are made where these arrive, by RingAttention or "
                f"AllGatherAttention (of values, HybridAttention too), got {self}: use one of "
                f"these."
            )

    def apply_whole(self, mixer: nn.Module) -> None:
        if self.kernel != AUTO and isinstance(mixer, MaskedMixer):
            mixer.kernel = self.kernel

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) is KeysFromValues:
            self.check_values_only()
        if type(module) is LatentAttention:
            self.check_latents()
        if type(module) is CrossAttention:
            self.check_cross()
        install_attention_rules(self.op)
        claimed = super()._apply(module, device_mesh)
        if isinstance(claimed, MaskedMixer):
            self.apply_whole(claimed)
            # All heads read a latent, so that ranks of their axis sum its gradients as well.
            of_heads = isinstance(claimed, LatentAttention)
            claimed.wide = self.sums_wide(device_mesh.size(None if of_heads else 0))
            if claimed.wide:
                check_unrounded(claimed.kernel)
        return claimed
