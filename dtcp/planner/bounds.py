"""The least that a step takes on a mesh, known before the step is run there."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from dtcp.planner.axis_bytes import AxisBytes, weight_bytes
from dtcp.planner.cluster import Cluster
from dtcp.planner.forecast import Forecast
from dtcp.planner.setup import Setup
from dtcp.planner.sharded_weights import Unit
from dtcp.planner.timing import StepTime, weight_seconds

K = TypeVar("K")


@dataclass
class LeastSeconds:
    """Lower bounds of the time of a step, from weights, and from meshes that were forecast.

    With the same tp, ranks of every mesh have as many tokens of a step, so their matmuls and their
    transfers over tp are those of one that was forecast; and with the same ep, those over ep, of
    which none comes faster than inside a node. Attention on all ranks together is the same, too:
    the slowest rank of one mesh does no less than the least busy rank of another.
    """

    cluster: Cluster
    _computed: dict[int, float] = field(default_factory=dict)
    _over_tp: dict[int, float] = field(default_factory=dict)
    _over_ep: dict[tuple[int, int], float] = field(default_factory=dict)

    def note(self, forecast: Forecast, time: StepTime) -> None:
        """A mesh was forecast, in its plain way."""
        degrees, times = forecast.setup.degrees, forecast.setup.micro_batches
        mixers = min(rank.flops for rank in forecast.ranks) * times
        computed = time.matmuls + mixers / (self.cluster.flops * self.cluster.mixer)
        experts = forecast.by_axis.get("ep", AxisBytes()).total / self.cluster.inside
        _lower(self._computed, degrees.tp, computed)
        _lower(self._over_tp, degrees.tp, time.exposed["tp"])
        _lower(self._over_ep, (degrees.tp, degrees.ep), experts)

    def of(self, setup: Setup, units: Sequence[Unit]) -> float:
        """Seconds of a step at least, in the plain way."""
        degrees = setup.degrees
        gathered = weight_bytes([*_untrained(units)], setup)
        computed = self._computed.get(degrees.tp, 0.0)
        return (
            max(computed, weight_seconds(gathered, degrees, self.cluster))
            + self._over_tp.get(degrees.tp, 0.0)
            + self._over_ep.get((degrees.tp, degrees.ep), 0.0)
        )


def _lower(known: dict[K, float], key: K, value: float) -> None:
    known[key] = min(value, known.get(key, value))


def _untrained(units: Iterable[Unit]) -> Iterable[Unit]:
    """Without gradients: which weights get one is only known once a step was run."""
    for unit in units:
        yield replace(unit, weights=tuple(replace(w, trained=False) for w in unit.weights))
