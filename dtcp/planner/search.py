"""Try meshes, strategies, layouts and checkpointing; rank what fits, and say what does not."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from dtcp.distributed.mesh import Degrees
from dtcp.parallelize import NoCheckpoint, SelectiveCheckpoint
from dtcp.planner.cluster import Cluster
from dtcp.planner.forecast import Forecast, assembled, chosen_ranks, look_at
from dtcp.planner.setup import BF16, Precision, Setup
from dtcp.planner.subject import Subject
from dtcp.planner.timing import StepTime, step_time
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention, UlyssesAttention


@dataclass(frozen=True)
class Wish:
    """What is to be run.

    Args:
        documents: of one row.
        rows: of a step, on all ranks together.
    """

    documents: Documents
    rows: int
    precision: Precision = BF16


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
class Search:
    """All that was tried, best first."""

    candidates: tuple[Candidate, ...]
    refused: tuple[Refused, ...]

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


class Planner:
    """Forecasts setups of one model; what several share is looked at once."""

    def __init__(self, subject: Subject, cluster: Cluster, wish: Wish) -> None:
        self.subject, self.cluster, self.wish = subject, cluster, wish
        self._known: dict[Any, Any] = {}

    def candidate(self, setup: Setup) -> Candidate:
        """Raises ValueError: the model does not take it."""
        degrees = setup.degrees
        how = (setup.layout, repr(setup.attention), setup.checkpoint)
        key = (degrees.cp, degrees.tp, setup.documents, *how)
        if key not in self._known:
            self._known[key] = look_at(self.subject, setup, chosen_ranks(degrees.cp))
        step, ranks = self._known[key]
        found = assembled(self.subject, setup, step, ranks)
        return Candidate(setup, found, step_time(found, self.cluster), self.cluster.usable)

    def search_mesh(self, degrees: Degrees) -> Search:
        """Every strategy, layout and checkpointing on one mesh.

        Raises:
            ValueError: the rows of a step do not divide among its data-parallel ranks.
        """
        data = degrees.dp_replicate * degrees.dp_shard
        if self.wish.rows % data:
            raise ValueError(
                f"A step has as many rows for each data-parallel rank, got --global-batch "
                f"{self.wish.rows} on {data} of them: give a multiple of {data}."
            )
        plain = self._plain(degrees)
        return self._ranked([plain, *self._variants(plain)])

    def _ranked(self, setups: Iterable[Setup], before: Search | None = None) -> Search:
        found = [] if before is None else list(before.candidates)
        refused = [] if before is None else list(before.refused)
        for setup in setups:
            try:
                found.append(self.candidate(setup))
            except (ValueError, TypeError) as error:
                refused.append(Refused(setup, str(error)))
        found.sort(key=lambda candidate: candidate.score, reverse=True)
        return Search(tuple(found), tuple(refused))

    def search(self, *, refine: int = 3, say: Callable[[str], None] = lambda _: None) -> Search:
        """Every mesh in one plain way, then other ways on the best meshes."""
        meshes = list(self.meshes())
        say(f"tries {len(meshes)} meshes")
        plain = self._ranked(self._plain(degrees) for degrees in meshes)
        best = plain.candidates[:refine]
        say(f"tries other strategies, layouts and checkpointing on the best {len(best)}")
        variants = (setup for candidate in best for setup in self._variants(candidate.setup))
        return self._ranked(variants, plain)

    def meshes(self) -> Iterator[Degrees]:
        """Degrees whose product is the cluster, with rows for all data-parallel ranks."""
        world, node = self.cluster.gpus, self.cluster.per_node
        for tp in _divisors(min(world, node)):
            if world % tp:
                continue
            for cp in _divisors(world // tp):
                data = world // tp // cp
                if self.wish.rows % data or self.wish.documents.seq_len < 2 * cp:
                    continue
                for replicas in sorted({1, *self._replicas(data, cp * tp)}):
                    yield Degrees(replicas, data // replicas, cp, tp)

    def _replicas(self, data: int, rest: int) -> list[int]:
        """One way to replicate weights: so that a copy stays inside a node."""
        copies = data // max(1, self.cluster.per_node // rest)
        return [copies] if copies > 1 and data % copies == 0 else []

    def _plain(self, degrees: Degrees) -> Setup:
        data = degrees.dp_replicate * degrees.dp_shard
        return Setup(
            degrees,
            self.wish.documents,
            micro_batches=self.wish.rows // data,
            precision=self.wish.precision,
        )

    def _variants(self, setup: Setup) -> Iterator[Setup]:
        cp, plain = setup.degrees.cp, setup
        ways: list[Any] = [RingAttention()]
        if cp > 1:
            ways += [AllGatherAttention(), UlyssesAttention()]
            ways += [HybridAttention(inner_ranks=u) for u in (2, 4, 8) if u < cp and cp % u == 0]
        for attention in ways:
            yield replace(plain, attention=attention, checkpoint=SelectiveCheckpoint())
            if not isinstance(attention, RingAttention):
                yield replace(plain, attention=attention)
        packed = len(setup.documents.lengths[0]) > 1
        if cp > 1 and packed and setup.layout is HeadTail:
            yield replace(plain, layout=DocumentBalanced)
            yield replace(plain, layout=DocumentBalanced, checkpoint=SelectiveCheckpoint())
        yield replace(plain, checkpoint=NoCheckpoint())
        if setup.micro_batches % 2 == 0:
            lengths = setup.documents.lengths * 2
            two = Documents(lengths, setup.documents.seq_len)
            yield replace(plain, documents=two, micro_batches=setup.micro_batches // 2)


def smallest_cluster(planner: Planner, most: int = 4096) -> int | None:
    """The fewest GPUs, by doubling, of which some plain mesh fits; None up to `most`."""
    gpus = planner.cluster.gpus * 2
    while gpus <= most:
        rows = max(planner.wish.rows, 1)
        wider = Planner(
            planner.subject, replace(planner.cluster, gpus=gpus), replace(planner.wish, rows=rows)
        )
        wider._known = planner._known
        for degrees in wider.meshes():
            try:
                if wider.candidate(wider._plain(degrees)).fits:
                    return gpus
            except (ValueError, TypeError):
                continue
        gpus *= 2
    return None


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
