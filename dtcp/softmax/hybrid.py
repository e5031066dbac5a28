"""Ulysses inside groups of neighbouring ranks, a ring (or one exchange) between the groups."""

from dataclasses import dataclass, field, replace

from torch.distributed.device_mesh import DeviceMesh

from dtcp._torch.mesh import unflattened
from dtcp.distributed.groups import group_name
from dtcp.distributed.nodes import check_ranks_per_node
from dtcp.metadata import AttentionMetadata
from dtcp.sequence.arguments import check_ints, check_kind
from dtcp.sequence.coords import Coords, tokens_in_documents
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.all_gather import ALL_GATHER, AllGatherAttention
from dtcp.softmax.joined_shards import UlyssesMetadata, joined, ulysses_metadata
from dtcp.softmax.metadata import KeyExchangeMetadata
from dtcp.softmax.moves import Peers
from dtcp.softmax.op import AttentionOp
from dtcp.softmax.positions import TokenPositions
from dtcp.softmax.ring import RING, RingAttention
from dtcp.softmax.style import AttentionStyle
from dtcp.softmax.ulysses import Ulysses, UlyssesAttention

ULYSSES_RING = AttentionOp("ulysses_ring_attention", Ulysses(RING.strategy), communicates=True)
ULYSSES_ALL_GATHER = AttentionOp(
    "ulysses_all_gather_attention", Ulysses(ALL_GATHER.strategy), communicates=True
)


@dataclass
class HybridAttention(AttentionStyle):
    """Heads dealt out among `inner_ranks` neighbours, the sequence streamed between such groups.

    Goes past the number of heads, where Ulysses must stop, and keeps most of the traffic among
    neighbours: one node's fast links inside, the network outside. Share one instance among the
    mixers of a plan; each instance makes its own process groups.

    Args:
        inner: how a group works together.
        outer: how the groups do.
        inner_ranks: neighbouring ranks per group; divides the axis.

    Keyword Args:
        boundary: InGraph() or EagerIsland().
        reduce_dtype: between groups, of merged outputs and of gradients of keys, as of
            AttentionStyle; inside a group of gradients of kv heads that are replicated.
        ranks_per_node: neighbours that share a node. With as many inner_ranks, heads are dealt out
            inside a node and the sequence over nodes: each key of a head crosses once to each node
            that reads it, where ranks of the node share the head, too. With fewer, `outer` has two
            tiers, between the groups of a node and between nodes.

    Traffic per rank: that of Ulysses among u = inner_ranks, plus that of `outer` among n / u
    shards of u * L tokens, with max(G, u) / u kv heads per rank.
    From Fang and Zhao 2024, USP, section 3, https://arxiv.org/abs/2405.07719
    """

    inner: UlyssesAttention = field(default_factory=UlyssesAttention)
    outer: RingAttention | AllGatherAttention = field(default_factory=RingAttention)
    inner_ranks: int = field(default=2, kw_only=True)
    _made: tuple[DeviceMesh, list[str]] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    takes_memory = True

    @property
    def op(self) -> AttentionOp:
        return ULYSSES_RING if isinstance(self.outer, RingAttention) else ULYSSES_ALL_GATHER

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ints("HybridAttention", least=1, inner_ranks=self.inner_ranks)
        check_kind("HybridAttention", UlyssesAttention, inner=self.inner)
        check_kind("HybridAttention", (RingAttention, AllGatherAttention), outer=self.outer)
        for part in (self.inner, self.outer):
            self.check_part(part)
        if on_nodes := [x for x in (self.inner, self.outer) if x.ranks_per_node]:
            raise ValueError(
                f"HybridAttention splits the ranks of a node itself, got {on_nodes[0]} inside: "
                f"give ranks_per_node to HybridAttention, of the axis as a whole."
            )
        nodes = self.ranks_per_node
        if nodes and nodes % self.inner_ranks and self.inner_ranks % nodes:
            raise ValueError(
                f"HybridAttention deals heads out inside a node, or among whole nodes, got "
                f"inner_ranks={self.inner_ranks}, ranks_per_node={nodes}: choose inner_ranks that "
                f"divides the ranks of a node."
            )

    def groups(self, axis: DeviceMesh) -> list[str]:
        check_ranks_per_node("HybridAttention", axis.size(), self.ranks_per_node)
        if axis.size() % self.inner_ranks:
            raise ValueError(
                f"{self} splits its axis into equal groups, got {axis.size()} ranks with "
                f"inner_ranks={self.inner_ranks}: choose a divisor."
            )
        if (axis.mesh.diff() < 0).any():
            raise ValueError(
                f"{self} splits its axis into neighbours, as process groups count them: upwards, "
                f"got ranks {axis.mesh.tolist()}: list them upwards."
            )
        if self._made is None or self._made[0] is not axis:
            shape = (axis.size() // self.inner_ranks, self.inner_ranks)
            split = unflattened(axis, shape, ("between_groups", "within_group"))
            names = [group_name(split["within_group"]), group_name(split["between_groups"])]
            self._made = (axis, [group_name(axis), *names])
        return self._made[1]

    def rank_metadata(
        self, layout: SequenceLayout, rank: int, intervals: KeyIntervals
    ) -> UlyssesMetadata:
        groups = layout.num_shards // self.inner_ranks
        group = rank // self.inner_ranks
        # Groups of one node are neighbours among the groups.
        nodes = self.ranks_per_node // self.inner_ranks
        outer = replace(self.outer, tile=self.tile, ranks_per_node=nodes)
        keys = intervals.keys
        if keys is not None:
            intervals = replace(intervals, keys=joined(keys, groups))
        between = outer.rank_metadata(joined(layout, groups), group, intervals)
        layouts = (layout, keys, between)
        return ulysses_metadata(
            *layouts, num_shards=groups, shard=group, ranks_per_node=self.ranks_per_node
        )

    def with_position_ids(
        self, metadata: AttentionMetadata, coords: Coords, layout: SequenceLayout, rank: int
    ) -> AttentionMetadata:
        assert isinstance(metadata, UlyssesMetadata)
        between = metadata.outer
        assert isinstance(between, KeyExchangeMetadata)
        positions, used = TokenPositions.of(coords), tokens_in_documents(coords)
        between = replace(between, in_line=metadata.in_line).with_key_position_ids(positions)
        return replace(
            metadata,
            outer=replace(between, in_line=False),
            position_ids=positions.own(layout, rank),
            sees=layout.shard(used, rank).contiguous(),
        )

    def peers(self, num_ranks: int, rank: int) -> Peers:
        return Peers(num_ranks, rank, self.inner_ranks)
