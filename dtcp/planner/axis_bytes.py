"""Bytes by mesh axis: of torch's collectives, of weights, and of tokens on their way to experts."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import distributed as dist

from dtcp.distributed.groups import group_of
from dtcp.distributed.moves import Moved
from dtcp.distributed.ops import moves_of
from dtcp.planner.even_routes import EXPERT_OPS, ExpertMoves
from dtcp.planner.setup import Setup
from dtcp.planner.sharded_weights import Unit, sharding_ranks
from dtcp.planner.step import StepNumbers, TracedStep
from dtcp.planner.trace import OpCall

NO_GROUPS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class AxisBytes:
    """Bytes that a rank receives over an axis in a step, by direction."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: "AxisBytes") -> "AxisBytes":
        return AxisBytes(self.forward + other.forward, self.backward + other.backward)

    def times(self, count: int) -> "AxisBytes":
        return AxisBytes(self.forward * count, self.backward * count)


def torch_bytes(step: StepNumbers, setup: Setup) -> dict[str, AxisBytes]:
    """Bytes that torch's collectives bring a rank in a step, by axis."""
    by_axis: dict[str, AxisBytes] = defaultdict(AxisBytes)
    for (place, group), size in step.trace.collectives.items():
        axis = step.axes.get(group, "other")
        if size:
            times = size * step.times(place.part) * setup.micro_batches
            by_axis[axis] += AxisBytes(*((0, times) if place.backward else (times, 0)))
    for axis, moved in weight_bytes(step.units, setup).items():
        by_axis[axis] += moved
    if setup.degrees.dp_replicate > 1:
        by_axis["dp_replicate"] += _replica_bytes(step, setup)
    return dict(by_axis)


def weight_bytes(units: Sequence[Unit], setup: Setup) -> dict[str, AxisBytes]:
    """Gathers of every unit, again before backward where it was freed, and sums of gradients.

    Weights that are spread over ep are sharded over edp, others over fsdp.
    """
    moved = {"fsdp": _weight_bytes(units, setup, spread=False)}
    if setup.degrees.ep > 1:
        moved["edp"] = _weight_bytes(units, setup, spread=True)
    return moved


def _weight_bytes(units: Sequence[Unit], setup: Setup, *, spread: bool) -> AxisBytes:
    degrees, precision = setup.degrees, setup.precision
    ranks = sharding_ranks(degrees, spread=spread)
    there = back = 0
    for unit in units:
        gather = (ranks - 1) * unit.kept(degrees, spread=spread)
        summed = unit.summed(degrees, precision, spread=spread)
        back += unit.count * (ranks - 1) * summed
        there += unit.count * gather
        back += unit.count * gather * unit.resharded
    return AxisBytes(there, back).times(setup.micro_batches)


def _replica_bytes(step: StepNumbers, setup: Setup) -> AxisBytes:
    """Shards of gradients are summed once more over replicas, by an all-reduce."""
    degrees, replicas = setup.degrees, setup.degrees.dp_replicate
    back = 0
    for unit in step.units:
        for spread in (False, True):
            summed = unit.summed(degrees, setup.precision, spread=spread)
            back += unit.count * (2 * (replicas - 1) * summed // replicas)
    return AxisBytes(0, back).times(setup.micro_batches)


def over_cp(call: OpCall, step: TracedStep) -> bool:
    """Whether an op of ours communicates over cp, as mixers do; experts and routers do not."""
    return call.op.name() not in EXPERT_OPS and call.group in (None, *step.groups)


def note_other_groups(step: TracedStep) -> None:
    """Add what our ops move over neither cp nor ep, as routers' losses do, to torch's bytes."""
    for call in step.trace.calls:
        if call.op.name() in EXPERT_OPS or over_cp(call, step):
            continue
        group, moves = call.group, moves_of(call.op)
        if group is not None and moves is not None:
            args, kwargs = call.arguments({}, NO_GROUPS)
            step.trace.collectives[call.place, group] += sum(moves(*args, **kwargs).received)


def expert_moves(step: TracedStep) -> tuple[ExpertMoves, ...]:
    """What the traced rank's experts move over ep; called inside the trace's process group."""
    moved: dict[tuple[str, str], list[Moved]] = defaultdict(lambda: [Moved(), Moved()])
    for call in step.trace.calls:
        if call.op.name() in EXPERT_OPS:
            args, kwargs = call.arguments({}, NO_GROUPS)
            group, moves = call.group, moves_of(call.op)
            assert moves is not None and group is not None  # each of them communicates
            moved[call.place.part, group][call.place.backward] += moves(*args, **kwargs)
    return tuple(
        ExpertMoves(
            part,
            step.times(part),
            dist.get_rank(),
            tuple(dist.get_process_group_ranks(group_of(group))),
            *passes,
        )
        for (part, group), passes in moved.items()
    )
