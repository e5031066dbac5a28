"""Try meshes, strategies, layouts and checkpointing; rank what fits, and say what does not."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

from dtcp.distributed.mesh import Degrees
from dtcp.planner.bounds import LeastSeconds
from dtcp.planner.cluster import Cluster
from dtcp.planner.forecast import Forecast, assembled
from dtcp.planner.row_forecasts import RowForecasts
from dtcp.planner.search_space import SearchSpace
from dtcp.planner.setup import Setup
from dtcp.planner.subject import Subject
from dtcp.planner.timing import StepTime, step_time
from dtcp.planner.workload import Workload

MOST_ROW_FORECASTS = 24
"""Forecasts beyond which meshes that others make pointless are skipped."""

SHOWN = 12
"""How many setups of a kind a report lists."""

AT_ONCE = 4
"""Columns of meshes that differ in cp that are looked at before others are left out."""

REFINED = 3
"""How many of the best meshes are tried in other ways."""

MOST_GPUS = 4096
"""The largest cluster that is suggested."""


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
    """Meshes that were not forecast, because one with a smaller cp fits."""
    outdone: int = 0
    """Meshes that were not forecast, because the best SHOWN take less time than they can."""

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


class Planner:
    """Forecasts setups of one model; what several share is forecast once.

    Args:
        processes: how many trace steps; more than 1 are forked from this one.
    """

    def __init__(
        self, subject: Subject, cluster: Cluster, workload: Workload, *, processes: int = 1
    ) -> None:
        self.cluster, self.workload = cluster, workload
        self.say: Callable[[str], None] = lambda _: None
        self.row_forecasts = RowForecasts(subject, processes)

    @property
    def space(self) -> SearchSpace:
        """What there is to try."""
        return SearchSpace(self.cluster, self.workload, self.row_forecasts)

    def on(self, cluster: Cluster) -> "Planner":
        """The same model and rows on another cluster, with all forecasts made so far."""
        other = copy(self)
        other.cluster = cluster
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
                f"A step has equally many rows for each data-parallel rank, got --global-batch "
                f"{self.workload.rows} on {data} of them: give a multiple of {data}."
            )
        self.workload.check_cut(degrees)
        plain = self.space.plain(degrees)
        return self.ranked([plain, *self.space.variants(plain)])

    def ranked(self, setups: Iterable[Setup], before: Search | None = None) -> Search:
        """What becomes of each setup, added to what was found before, best first."""
        before = before or Search()
        candidates, refused = list(before.candidates), list(before.refused)
        tried = list(setups)
        self.row_forecasts.prepare(tried, self.say)
        for setup in tried:
            try:
                candidates.append(self.candidate(setup))
            except (ValueError, TypeError) as error:
                refused.append(Refused(setup, str(error)))
        candidates.sort(key=lambda candidate: candidate.score, reverse=True)
        return replace(before, candidates=tuple(candidates), refused=tuple(refused))

    def search(self) -> Search:
        """Every mesh in one plain way, then other ways on the best meshes."""
        meshes = list(self.space.meshes())
        self.say(f"tries {len(meshes)} meshes")
        small, sifted = self.sift(self.space.plain(degrees) for degrees in meshes)
        if self.row_forecasts.count(small) <= MOST_ROW_FORECASTS:
            worth, outdone = small, 0
        else:
            worth, outdone = self._narrow(small)
        if not worth:
            # So that the report can say how much memory is missing.
            worth = [each.setup for each in sifted.too_large[:2]]
            sifted = replace(sifted, too_large=sifted.too_large[2:])
        passed = len(small) - len(worth) - outdone if small else 0
        plain = replace(self.ranked(worth, sifted), passed=passed, outdone=outdone)
        best = plain.candidates[:REFINED]
        self._say_best(plain.candidates)
        self.say(f"tries other strategies, layouts and checkpointing on the best {len(best)}")
        return self.ranked(
            (setup for candidate in best for setup in self.space.variants(candidate.setup)), plain
        )

    def _narrow(self, setups: Iterable[Setup]) -> tuple[list[Setup], int]:
        """Meshes worth a forecast, and how many others cannot be among the best.

        The columns that promise most come first. Once as many meshes fit as are shown, a column
        whose least time is longer than theirs is left out.
        """
        columns = _columns_of(setups)
        least, open_keys = LeastSeconds(self.cluster), list(columns)
        worth: dict[tuple[int, int, bool], list[Setup]] = {}
        found: list[Candidate] = []

        def least_of(key: tuple[int, int, bool]) -> float:
            return min(least.of(each, self.row_forecasts.units(each)) for each in columns[key])

        while open_keys:
            open_keys.sort(key=least_of)
            taken, open_keys = open_keys[:AT_ONCE], open_keys[AT_ONCE:]
            worth |= self._narrow_columns({key: columns[key] for key in taken})
            tried = [setup for key in taken for setup in worth[key]]
            self.row_forecasts.prepare(tried, self.say)
            found += [each for each in map(self._candidate_or_none, tried) if each is not None]
            for each in found:
                least.note(each.forecast, each.time)
            found.sort(key=lambda candidate: candidate.score, reverse=True)
            self._say_best(found)
            if len(found) >= SHOWN and (last := found[SHOWN - 1]).fits:
                open_keys = [key for key in open_keys if least_of(key) <= last.time.total]
        outdone = sum(len(column) for key, column in columns.items() if key not in worth)
        return [setup for key in columns if key in worth for setup in worth[key]], outdone

    def _narrow_columns(
        self, columns: Mapping[tuple[int, int, bool], list[Setup]]
    ) -> dict[tuple[int, int, bool], list[Setup]]:
        """Of meshes that differ in cp alone: the smallest cp that fits, and those beside it.

        A larger cp computes as much and moves more; memory falls as it grows, so it is found by
        halves.
        """
        spans = {key: (0, len(column)) for key, column in columns.items()}
        while middles := {key: sum(span) // 2 for key, span in spans.items() if span[0] < span[1]}:
            looked_at = [columns[key][middle] for key, middle in middles.items()]
            self.row_forecasts.prepare(looked_at, self.say)
            for key, middle in middles.items():
                low, high = spans[key]
                # A cp that is refused is too large for the row.
                goes_on = self._fits(columns[key][middle]) is False
                spans[key] = (middle + 1, high) if goes_on else (low, middle)
        return {
            key: columns[key][max(0, smallest - 1) : smallest + 2]
            for key, (smallest, _) in spans.items()
        }

    def _say_best(self, found: Sequence[Candidate]) -> None:
        if found and found[0].fits:
            best = found[0]
            self.say(f"best so far {best.tokens_per_second:,.0f} tokens/s, {best.setup.degrees}")

    def has_room(self) -> bool:
        """Whether any mesh fits, in its plain way."""
        worth, _ = self.sift(self.space.plain(degrees) for degrees in self.space.meshes())
        columns = list(_columns_of(worth).values())
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
        candidate = self._candidate_or_none(setup)
        return candidate.fits if candidate is not None else None

    def _candidate_or_none(self, setup: Setup) -> Candidate | None:
        try:
            return self.candidate(setup)
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


def _columns_of(setups: Iterable[Setup]) -> dict[tuple[int, int, bool], list[Setup]]:
    """Setups whose meshes differ in cp and the data-parallel axes alone, by cp."""
    columns: dict[tuple[int, int, bool], list[Setup]] = {}
    for setup in sorted(setups, key=lambda setup: setup.degrees.cp):
        degrees = setup.degrees
        key = (degrees.tp, degrees.ep, degrees.dp_replicate > 1)
        columns.setdefault(key, []).append(setup)
    return columns


def smallest_cluster(planner: Planner) -> int | None:
    """The fewest GPUs, by doubling, of which some plain mesh fits; None up to MOST_GPUS."""
    gpus, node = planner.cluster.gpus * 2, planner.cluster.per_node
    while gpus <= MOST_GPUS:
        # Whole nodes, where there are several.
        taken = gpus if gpus < node else -(-gpus // node) * node
        if planner.on(replace(planner.cluster, gpus=taken)).has_room():
            return taken
        gpus *= 2
    return None
