"""Recurrent mixers on a sequence sharded over a mesh axis."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.moves import Moves
from dtcp.metadata import AttentionMetadata
from dtcp.mixer import ClaimedMixer, Mixer
from dtcp.recurrent.claimed import (
    ContextParallelConv,
    ContextParallelDeltaRule,
    ContextParallelLinearAttention,
)
from dtcp.recurrent.conv import halo_moved
from dtcp.recurrent.linear import LINEAR
from dtcp.recurrent.metadata import SEGMENTED, chain_of, conv_metadata, delta_metadata, halo_route
from dtcp.recurrent.mixer import CausalConv1d, GatedDeltaRule, GatedLinearAttention, RecurrentMixer
from dtcp.recurrent.moves import ChannelShape, DeltaShape, states_moved, states_passed
from dtcp.recurrent.node_state_passing import NodeStatePassing
from dtcp.recurrent.op import DELTA_RULE
from dtcp.recurrent.state_exchange import (
    FEWEST_BYTES,
    FewestBytes,
    GatherStates,
    ScanStates,
    StateExchange,
)
from dtcp.recurrent.state_passing import StatePassing
from dtcp.sequence.arguments import check_kind
from dtcp.sequence.coords import Coords, documents_of
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.node_routes import NodeRoutes
from dtcp.sequence.stretches import Stretches, left_routes
from dtcp.style import ALL_LAYOUTS, MixerShape, MixerStyle


@dataclass
class RecurrentStyle(MixerStyle):
    """Take a recurrent mixer over; applied to the 1-D axis of the sequence."""

    layouts: ClassVar[tuple[type[SequenceLayout], ...]] = ALL_LAYOUTS

    def make_metadata(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> AttentionMetadata:
        assert isinstance(mixer, RecurrentMixer)
        layout = mixer.own_layout(layout)
        self.check(mixer, layout)
        if isinstance(mixer, CausalConv1d):
            nodes = self.ranks_per_node
            return conv_metadata(coords, mixer.reach + 1, layout, rank, ranks_per_node=nodes)
        return delta_metadata(coords, layout, rank, ranks_per_node=self.ranks_per_node)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.check_one_axis(device_mesh)
        DELTA_RULE.install_dtensor_rules()
        LINEAR.install_dtensor_rules()
        return super()._apply(module, device_mesh)


@dataclass
class GatedDeltaCP(RecurrentStyle):
    """The gated delta rule where each rank holds some segments of the sequence.

    A segment is a map of the state that enters it. Ranks exchange these maps, and no activation:
    what travels does not grow with the sequence, in any layout. Where layouts follow documents,
    states are handed on at cuts inside of documents alone.

    Args:
        states: how the maps are brought on Contiguous and HeadTail; on other layouts each goes
            straight to the ranks that hold what follows in its document.

    Keyword Args:
        ranks_per_node: neighbours that share a node: a map that is gathered, or handed on along a
            document, crosses once to each node that reads it, and is spread inside. A scan crosses
            from one rank of a node to one of another, with what the node's ranks have composed.

    Traffic per rank, received, each way: with summaries of B * H * K * (K + V) fp32 elements,
    (n - 1) * P of them if gathered, P segments per rank (1 of Contiguous, 2 of HeadTail);
    ceil(log2(n)) if scanned, and three times that of HeadTail. On other layouts: one of H * K *
    (K + V) elements from each stretch of others that comes before one of its own in a document.
    """

    claims: ClassVar[Mapping[type[Mixer], type[ClaimedMixer]]] = {
        GatedDeltaRule: ContextParallelDeltaRule
    }

    states: StateExchange = FEWEST_BYTES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind(type(self).__name__, (GatherStates, ScanStates, FewestBytes), states=self.states)

    def check(self, mixer: Mixer, layout: SequenceLayout) -> None:
        super().check(mixer, layout)
        if isinstance(self.states, ScanStates) and not issubclass(layout.kind, SEGMENTED):
            raise ValueError(
                f"ScanStates composes the segments of Contiguous and HeadTail, got layout="
                f"{layout}: leave states out, or use one of these layouts."
            )

    def moves(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int, shape: MixerShape
    ) -> Moves:
        assert isinstance(shape, DeltaShape)
        assert isinstance(mixer, RecurrentMixer)
        layout = mixer.own_layout(layout)
        if not issubclass(layout.kind, SEGMENTED):
            stretches = Stretches.of(layout, documents_of(coords))
            summary, moved = shape.summary // shape.batch, []
            for reverse in (False, True):
                sent, received = self._states_passed(stretches, rank, reverse=reverse)
                moved.append(states_passed(sent, received, summary, rank))
            return Moves(*moved)
        ranks, segments = chain_of(layout).shape
        scan = self.states.scans(ranks, segments, shape.summary)
        there, back = (
            states_moved(
                shape.summary,
                ranks,
                segments,
                rank,
                scan=scan,
                reverse=reverse,
                ranks_per_node=self.ranks_per_node,
            )
            for reverse in (False, True)
        )
        return Moves(there, back)

    def _states_passed(
        self, stretches: Stretches, rank: int, *, reverse: bool
    ) -> tuple[list[int], list[int]]:
        """Summaries sent to and received from each rank."""
        if (nodes := self.ranks_per_node) in (0, 1, stretches.num_shards):
            sent, received = StatePassing.of(stretches, rank, reverse=reverse).counts.tolist()
        else:
            passing = NodeStatePassing.of(stretches, rank, reverse=reverse, ranks_per_node=nodes)
            sent, received = passing.moved.tolist()
        return sent, received


@dataclass
class GatedLinearCP(GatedDeltaCP):
    """Gated linear attention where each rank holds some segments of the sequence.

    By the exchange of the gated delta rule, with the maps of a `LinearShape`.

    Args:
        states: how the maps are brought.

    Traffic per rank, received, each way: with summaries of B * H * K * (1 + V) fp32 elements,
    (n - 1) * P of them if gathered, P segments per rank (1 of Contiguous, 2 of HeadTail);
    ceil(log2(n)) if scanned, and three times that of HeadTail.
    """

    claims: ClassVar[Mapping[type[Mixer], type[ClaimedMixer]]] = {
        GatedLinearAttention: ContextParallelLinearAttention
    }


@dataclass
class CausalConvCP(RecurrentStyle):
    """A causal convolution that brings the (w - 1) * d tokens left of each segment.

    They go straight to whoever holds what follows.

    Keyword Args:
        ranks_per_node: neighbours that share a node: what several of them read, as they do where a
            rank has fewer tokens of a document than that, crosses once.

    Traffic per rank, received: (w - 1) * d * B * C elements for each segment whose left neighbour
    another rank holds, of Contiguous and HeadTail. Of other layouts: at most (w - 1) * d * C for
    each stretch that starts inside of a document. As much back.
    """

    claims: ClassVar[Mapping[type[Mixer], type[ClaimedMixer]]] = {CausalConv1d: ContextParallelConv}

    def moves(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int, shape: MixerShape
    ) -> Moves:
        assert isinstance(shape, ChannelShape)
        assert isinstance(mixer, CausalConv1d)
        layout, token = mixer.own_layout(layout), shape.token
        if issubclass(layout.kind, SEGMENTED):
            route = halo_route(layout, mixer.reach + 1, rank)
            routes = NodeRoutes(route, route[:, :0])
        else:
            stretches = Stretches.of(layout, documents_of(coords))
            routes = left_routes(stretches, mixer.reach, rank, self.ranks_per_node)
            token //= shape.batch
        there, back = (
            halo_moved(routes, token, layout.num_shards, rank, reverse=reverse)
            for reverse in (False, True)
        )
        return Moves(there, back)
