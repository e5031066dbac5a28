"""Try meshes, strategies, layouts and checkpointing; rank what fits, and say what does not."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from dtcp.distributed.mesh import Degrees
from dtcp.distributed.nodes import even_on_cp
from dtcp.parallelize import NoCheckpoint, SelectiveCheckpoint
from dtcp.planner.cluster import Cluster
from dtcp.planner.forecast import Forecast, assembled
from dtcp.planner.row_forecasts import RowForecasts
from dtcp.planner.setup import Setup
from dtcp.planner.subject import Subject
from dtcp.planner.timing import StepTime, step_time
from dtcp.planner.workload import Workload
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention, UlyssesAttention
from dtcp.softmax.style import AttentionStyle

MOST_ROW_FORECASTS = 24
"""Steps that are looked at before meshes that others make needless are passed over."""


@dataclass(frozen=True)
class Candidate:
    """A setup with its numbers on a cluster."""

    setup: Setup
    forecast: Forecast
    time: StepTime
    usable: int

    @property
    def fits(self) -> bool:
        return self.forecast.memory.total <= self.usable

    @property
    def missing(self) -> int:
        """Bytes too many."""
        return max(0, self.forecast.memory.total - self.usable)

    @property
    def tokens_per_second(self) -> float:
        return self.setup.tokens / self.time.total

    @property
    def score(self) -> tuple[bool, float]:
        return (self.fits, self.tokens_per_second if self.fits else -float(self.missing))


@dataclass(frozen=True)
class Refused:
    """A mesh or strategy that the model does not take, and why."""

    setup: Setup
    why: str


@dataclass(frozen=True)
class TooLarge:
    """A setup whose weights alone leave no room: `needs` bytes at least, and its step unseen."""

    setup: Setup
    needs: int


@dataclass(frozen=True)
class Search:
    """All that was tried, best first."""

    candidates: tuple[Candidate, ...] = ()
    refused: tuple[Refused, ...] = ()
    too_large: tuple[TooLarge, ...] = ()
    passed: int = 0
    """Meshes that were not looked at, for one with a smaller cp fits."""

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


class Planner:
    """Forecasts setups of one model; what several share is looked at once.

    Args:
        processes: that trace steps; more than 1 are forked from this one.
    """

    def __init__(
        self, subject: Subject, cluster: Cluster, workload: Workload, *, processes: int = 1
    ) -> None:
        self.cluster, self.workload = cluster, workload
        self.row_forecasts = RowForecasts(subject, processes)

    def on(self, cluster: Cluster) -> "Planner":
        """The same model and rows on another cluster; what was seen stays known."""
        other = Planner(self.row_forecasts.subject, cluster, self.workload)
        other.row_forecasts = self.row_forecasts
        return other

    def candidate(self, setup: Setup) -> Candidate:
        """Raises ValueError: the model does not take it."""
        forecast = assembled(self.row_forecasts.subject, setup, self.row_forecasts.at(setup))
        return Candidate(setup, forecast, step_time(forecast, self.cluster), self.cluster.usable)

    def search_mesh(self, degrees: Degrees) -> Search:
        """Every strategy, layout and checkpointing on one mesh.

        Raises:
            ValueError: the rows of a step do not divide among its data-parallel ranks.
        """
        data = degrees.dp_replicate * degrees.dp_shard
        if self.workload.rows % data:
            raise ValueError(
                f"A step has as many rows for each data-parallel rank, got --global-batch "
                f"{self.workload.rows} on {data} of them: give a multiple of {data}."
            )
        self.workload.check_cut(degrees)
        plain = self.plain(degrees)
        return self.ranked([plain, *self._variants(plain)])

    def ranked(self, setups: Iterable[Setup], before: Search | None = None) -> Search:
        """What becomes of each, beside what was found before, best first."""
        before = before or Search()
        candidates, refused = list(before.candidates), list(before.refused)
        tried = list(setups)
        self.row_forecasts.prepare(tried)
        for setup in tried:
            try:
                candidates.append(self.candidate(setup))
            except (ValueError, TypeError) as error:
                refused.append(Refused(setup, str(error)))
        candidates.sort(key=lambda candidate: candidate.score, reverse=True)
        return replace(before, candidates=tuple(candidates), refused=tuple(refused))

    def search(self, *, refine: int = 3, say: Callable[[str], None] = lambda _: None) -> Search:
        """Every mesh in one plain way, then other ways on the best meshes."""
        meshes = list(self.meshes())
        say(f"tries {len(meshes)} meshes")
        small, sifted = self.sift(self.plain(degrees) for degrees in meshes)
        few = self.row_forecasts.count(small) <= MOST_ROW_FORECASTS
        worth = small if few else self._narrow(small)
        if not worth:
            # So that there is something to say of what is missing.
            worth = [each.setup for each in sifted.too_large[:2]]
            sifted = replace(sifted, too_large=sifted.too_large[2:])
        passed = len(small) - len(worth) if small else 0
        plain = replace(self.ranked(worth, sifted), passed=passed)
        best = plain.candidates[:refine]
        say(f"tries other strategies, layouts and checkpointing on the best {len(best)}")
        return self.ranked(
            (setup for candidate in best for setup in self._variants(candidate.setup)), plain
        )

    def _narrow(self, setups: Iterable[Setup]) -> list[Setup]:
        """Of meshes that differ in cp alone: the smallest cp that fits, and those beside it.

        A larger cp computes as much and moves more; memory falls as it grows, so it is found by
        halves.
        """
        columns = columns_of(setups)
        spans = {key: (0, len(column)) for key, column in columns.items()}
        while middles := {key: sum(span) // 2 for key, span in spans.items() if span[0] < span[1]}:
            self.row_forecasts.prepare(columns[key][middle] for key, middle in middles.items())
            for key, middle in middles.items():
                low, high = spans[key]
                # A cp that is refused is too large for the row.
                goes_on = self._fits(columns[key][middle]) is False
                spans[key] = (middle + 1, high) if goes_on else (low, middle)
        return [
            setup
            for key, (smallest, _) in spans.items()
            for setup in columns[key][max(0, smallest - 1) : smallest + 2]
        ]

    def has_room(self) -> bool:
        """Whether any mesh fits, in its plain way."""
        worth, _ = self.sift(self.plain(degrees) for degrees in self.meshes())
        columns = list(columns_of(worth).values())
        # The largest cp that is not refused needs least; what leaves most room first.
        columns.sort(key=lambda column: self.row_forecasts.least(column[-1]))
        for column in columns:
            for setup in reversed(column):
                if (fits := self._fits(setup)) is not None:
                    break
            if fits:
                return True
        return False

    def _fits(self, setup: Setup) -> bool | None:
        """None: it is refused."""
        try:
            return self.candidate(setup).fits
        except (ValueError, TypeError):
            return None

    def sift(self, setups: Iterable[Setup]) -> tuple[list[Setup], Search]:
        """Setups worth a look, for their weights fit, and what becomes of the others."""
        worth, large, refused = [], [], []
        for setup in setups:
            try:
                needs = self.row_forecasts.least(setup)
            except (ValueError, TypeError) as error:
                refused.append(Refused(setup, str(error)))
                continue
            if needs > self.cluster.usable:
                large.append(TooLarge(setup, needs))
            else:
                worth.append(setup)
        large.sort(key=lambda each: each.needs)
        return worth, Search((), tuple(refused), tuple(large))

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
        """Degrees of ep to try first: the least, that of a node, and all ranks that there are."""
        possible = self._expert_degrees(degrees)
        node = self.cluster.ranks_per_node
        inside = [ep for ep in possible if ep * self.workload.etp <= node]
        return sorted({*possible[:1], *inside[-1:], *possible[-1:]})

    def _expert_degrees(self, degrees: Degrees) -> list[int]:
        counts, etp = self.row_forecasts.expert_counts, self.workload.etp
        ranks = degrees.sparse // etp if counts else 1
        possible = [ep for ep in _divisors(ranks) if not any(n % ep for n in counts)]
        # What splits experts beside ep needs one.
        return possible if etp == 1 else possible[1:]

    def spread_over(self, degrees: Degrees, ep: int) -> Degrees:
        """The mesh with experts over ep, and over tp, too, where that is wished for."""
        return replace(degrees, ep=ep, etp=self.workload.etp if ep > 1 else 1)

    def plain(self, degrees: Degrees) -> Setup:
        """A mesh in one way, the first to be tried."""
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
            ranks_per_node=nodes_for(self.cluster, degrees),
            **settled,
        )

    def _variants(self, plain: Setup) -> list[Setup]:
        """Other ways to run a mesh, of those that are wished for."""
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


def nodes_for(cluster: Cluster, degrees: Degrees) -> int:
    """Ranks of a node as a run on this mesh has them: 0 for one tier, where nodes cut cp unevenly.

    Of one node, too.
    """
    nodes = cluster.ranks_per_node
    is_even = even_on_cp(degrees.cp, degrees.tp, nodes)
    return nodes if cluster.nodes > 1 and is_even else 0


def attention_styles(cp: int, **options: Any) -> list[AttentionStyle]:
    """Strategies of global attention that so many ranks have a use for, each with the options."""
    styles: list[AttentionStyle] = [RingAttention(**options)]
    if cp > 1:
        styles += [AllGatherAttention(**options), UlyssesAttention(**options)]
    inner = [u for u in (2, 4, 8) if u < cp and cp % u == 0]
    return styles + [HybridAttention(inner_ranks=u, **options) for u in inner]


def columns_of(setups: Iterable[Setup]) -> dict[tuple[int, int, bool], list[Setup]]:
    """Setups whose meshes differ in cp and the data-parallel axes alone, by cp."""
    columns: dict[tuple[int, int, bool], list[Setup]] = {}
    for setup in sorted(setups, key=lambda setup: setup.degrees.cp):
        degrees = setup.degrees
        key = (degrees.tp, degrees.ep, degrees.dp_replicate > 1)
        columns.setdefault(key, []).append(setup)
    return columns


def smallest_cluster(planner: Planner, most: int = 4096) -> int | None:
    """The fewest GPUs, by doubling, of which some plain mesh fits; None up to `most`."""
    gpus, node = planner.cluster.gpus * 2, planner.cluster.per_node
    while gpus <= most:
        # Whole nodes, where there are several.
        taken = gpus if gpus < node else -(-gpus // node) * node
        if planner.on(replace(planner.cluster, gpus=taken)).has_room():
            return taken
        gpus *= 2
    return None


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
