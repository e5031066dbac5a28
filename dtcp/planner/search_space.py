"""What a search tries for a workload on a cluster: meshes, and ways to run each of them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dtcp.distributed.mesh import Degrees
from dtcp.distributed.nodes import even_on_cp
from dtcp.parallelize import NoCheckpoint, SelectiveCheckpoint
from dtcp.planner.cluster import Cluster
from dtcp.planner.row_forecasts import RowForecasts
from dtcp.planner.setup import Setup
from dtcp.planner.workload import Workload
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention, UlyssesAttention
from dtcp.softmax.style import AttentionStyle


@dataclass(frozen=True)
class SearchSpace:
    """The meshes of a cluster, and the strategies, layouts and checkpointing of each.

    Args:
        row_forecasts: of the model, which say what experts it has and whether it reads a strategy.
    """

    cluster: Cluster
    workload: Workload
    row_forecasts: RowForecasts

    def meshes(self) -> Iterator[Degrees]:
        """Degrees whose product is the cluster, with rows for all data-parallel ranks."""
        world, node = self.cluster.gpus, self.cluster.ranks_per_node
        for tp in _divisors(node):
            if self.workload.etp not in (1, tp):
                continue
            for cp in _divisors(world // tp):
                data = world // tp // cp
                seq_len = self.workload.documents.seq_len
                parts = self.workload.parts(Degrees(cp=cp, tp=tp))
                if self.workload.rows % data or seq_len < 2 * cp or seq_len % parts:
                    continue
                for replicas in sorted({1, *self._replicas(data, cp * tp)}):
                    degrees = Degrees(replicas, data // replicas, cp, tp)
                    for ep in self._spread(degrees):
                        yield self.spread_over(degrees, ep)

    def _replicas(self, data: int, rest: int) -> list[int]:
        """One way to replicate weights: so that a copy stays inside a node."""
        copies = data // max(1, self.cluster.ranks_per_node // rest)
        return [copies] if copies > 1 and data % copies == 0 else []

    def _spread(self, degrees: Degrees) -> list[int]:
        """Degrees of ep to try first: the least, the largest inside a node, the largest of all."""
        possible = self._expert_degrees(degrees)
        node = self.cluster.ranks_per_node
        inside = [ep for ep in possible if ep * self.workload.etp <= node]
        return sorted({*possible[:1], *inside[-1:], *possible[-1:]})

    def _expert_degrees(self, degrees: Degrees) -> list[int]:
        counts, etp = self.row_forecasts.expert_counts, self.workload.etp
        ranks = degrees.sparse // etp if counts else 1
        possible = [ep for ep in _divisors(ranks) if not any(n % ep for n in counts)]
        # etp splits experts beside ep, and needs one.
        return possible if etp == 1 else possible[1:]

    def spread_over(self, degrees: Degrees, ep: int) -> Degrees:
        """The mesh with experts over ep, and over tp, too, where the workload asks for it."""
        return replace(degrees, ep=ep, etp=self.workload.etp if ep > 1 else 1)

    def plain(self, degrees: Degrees) -> Setup:
        """The first way in which a mesh is tried."""
        data = degrees.dp_replicate * degrees.dp_shard
        ring = RingAttention(reduce_dtype=self.workload.reduce_dtype)
        settled: dict[str, Any] = {"attention": ring}
        settled |= {
            name: value
            for name in ("attention", "layout", "checkpoint")
            if (value := getattr(self.workload, name)) is not None
        }
        return Setup(
            degrees,
            self.workload.documents,
            micro_batches=self.workload.rows // data,
            precision=self.workload.precision,
            reshard=self.workload.reshard,
            ranks_per_node=_nodes_for(self.cluster, degrees),
            **settled,
        )

    def variants(self, plain: Setup) -> list[Setup]:
        """Other ways to run a mesh, among those that the workload leaves open."""
        others = (setup for setup in self._others(plain) if self.workload.takes(setup))
        return [setup for setup in others if setup != plain]

    def _others(self, plain: Setup) -> Iterator[Setup]:
        is_open = self.workload.attention is None and self.row_forecasts.reads_strategy
        ways = attention_styles(plain.degrees.cp, reduce_dtype=self.workload.reduce_dtype)
        for attention in ways if is_open else [plain.attention]:
            yield replace(plain, attention=attention, checkpoint=SelectiveCheckpoint())
            if not isinstance(attention, RingAttention):
                yield replace(plain, attention=attention)
        packed = len(plain.documents.lengths[0]) > 1
        if plain.degrees.cp > 1 and packed and plain.layout is HeadTail:
            yield replace(plain, layout=DocumentBalanced)
            yield replace(plain, layout=DocumentBalanced, checkpoint=SelectiveCheckpoint())
        yield replace(plain, checkpoint=NoCheckpoint())
        near = {plain.degrees.ep * 2, plain.degrees.ep // 2} - {*self._spread(plain.degrees)}
        for ep in sorted(near & {*self._expert_degrees(plain.degrees)}):
            yield replace(plain, degrees=self.spread_over(plain.degrees, ep))
        if plain.micro_batches % 2 == 0:
            two = Documents(plain.documents.lengths * 2, plain.documents.seq_len)
            yield replace(plain, documents=two, micro_batches=plain.micro_batches // 2)


def _nodes_for(cluster: Cluster, degrees: Degrees) -> int:
    """`Setup.ranks_per_node` of a run: 0 on one node, or where nodes cut cp unevenly."""
    nodes = cluster.ranks_per_node
    is_even = even_on_cp(degrees.cp, degrees.tp, nodes)
    return nodes if cluster.nodes > 1 and is_even else 0


def attention_styles(cp: int, **options: Any) -> list[AttentionStyle]:
    """The strategies of global attention that make sense on cp ranks, each with these options."""
    styles: list[AttentionStyle] = [RingAttention(**options)]
    if cp > 1:
        styles += [AllGatherAttention(**options), UlyssesAttention(**options)]
    inner = [u for u in (2, 4, 8) if u < cp and cp % u == 0]
    return styles + [HybridAttention(inner_ranks=u, **options) for u in inner]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
