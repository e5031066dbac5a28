"""The most memory of a rank in a step, put together from one block of each kind."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from dtcp.planner.setup import Setup
from dtcp.planner.sharded_weights import Unit
from dtcp.planner.step import StepNumbers
from dtcp.planner.trace import OUTSIDE, Place, Stretch, Trace


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of one rank at the moment when they are most.

    Args:
        parameters, optimizer: this rank's shards.
        gradients: shards summed so far, and those of the unit at work before they are sharded.
        activations: kept for the backward pass.
        workspace: what the part at work holds beside what it keeps.
        gathered: whole parameters of the units at work.
        inputs: the batch.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    workspace: int = 0
    gathered: int = 0
    inputs: int = 0
    where: str = ""

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by what they are for."""
        return {
            each.name: getattr(self, each.name) for each in fields(self) if each.name != "where"
        }


def peak_memory(step: StepNumbers, setup: Setup) -> PeakMemory:
    """Walk through the step block by block, and note the moment of most memory."""
    sizes = _UnitSizes(step, setup)
    walk = _Walk(step, setup, sizes)
    order = _order(step)
    walk.run(Place(), walk.first)
    for kind in order:
        walk.run(Place(kind), walk.of(Place(kind)))
    walk.run(Place(), walk.rest(backward=False))
    walk.run(Place(backward=True), walk.head_backward)
    for kind in reversed(order):
        walk.run(Place(kind, backward=True), walk.of(Place(kind, backward=True)))
    walk.run(Place(backward=True), walk.rest(backward=True))
    return walk.most


def least_memory(units: Sequence[Unit], setup: Setup) -> int:
    """Bytes of weights, gradients and the optimizer alone, where they are most: at least so many.

    Known before a step is run; `peak_memory` adds what the step keeps and works on.
    """
    step = StepNumbers(Trace(), [], list(units), 0, 0, {})
    walk = _Walk(step, setup, _UnitSizes(step, setup))
    for unit in units:
        walk.run(Place(unit.part or OUTSIDE, backward=True), [Stretch(Place(), 0, 0, 0)])
    return walk.most.total


def _order(step: StepNumbers) -> list[str]:
    """The kind of every block, in the order of the model."""
    places = {name: kind.name for kind in step.kinds for name in kind.blocks}
    return [places[name] for name in sorted(places, key=_natural)]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


class _UnitSizes:
    """Bytes of a unit's whole parameters and gradients, by the part of the step that uses it."""

    def __init__(self, step: StepNumbers, setup: Setup) -> None:
        degrees, reduce = setup.degrees, setup.precision.reduce.itemsize
        outside = [unit for unit in step.units if not unit.part]
        self.kept_whole = sum(unit.gathered(degrees) for unit in outside if not unit.resharded)
        self.gathered: dict[str, int] = {}
        self.summed: dict[str, int] = {}
        self.own: dict[str, int] = {}
        for unit in step.units:
            part, own = unit.part or OUTSIDE, unit.numbers(degrees)
            self.gathered[part] = max(self.gathered.get(part, 0), unit.gathered(degrees))
            self.summed[part] = max(self.summed.get(part, 0), unit.whole(degrees) * reduce)
            self.own[part] = self.own.get(part, 0) + own
        self.shard = sum(unit.numbers(degrees) * unit.count for unit in step.units)


class _Walk:
    def __init__(self, step: StepNumbers, setup: Setup, sizes: _UnitSizes) -> None:
        self.step, self.setup, self.sizes = step, setup, sizes
        precision = setup.precision
        width = precision.master.itemsize
        numbers = sizes.shard
        self.parameters = numbers * width
        self.optimizer = precision.states * numbers * width
        # Of earlier micro-batches, all; else those of the blocks whose backward is done.
        self.all_gradients = numbers * width
        self.done = self.all_gradients if setup.micro_batches > 1 else 0
        self.kept, self.most = 0, PeakMemory()
        of = [s for s in step.trace.stretches if s.place.part == OUTSIDE]
        forward = [s for s in of if not s.place.backward]
        backward = [s for s in of if s.place.backward]
        self.first, self._forward = forward[:1], forward[1:]
        self.head_backward, self._backward = backward[:1], backward[1:]

    def of(self, place: Place) -> list[Stretch]:
        return [s for s in self.step.trace.stretches if s.place == place]

    def rest(self, *, backward: bool) -> list[Stretch]:
        return self._backward if backward else self._forward

    def run(self, place: Place, stretches: list[Stretch]) -> None:
        """Go through the stretches of a part once."""
        part = place.part
        for stretch in stretches:
            above = stretch.peak - stretch.start
            kept = min(self.kept, self.kept + stretch.end - stretch.start)
            self._note(place, kept, self.kept + above - kept)
            self.kept += stretch.end - stretch.start
        if place.backward and self.setup.micro_batches == 1:
            share = self.sizes.own.get(part, 0) * self.setup.precision.master.itemsize
            self.done = min(self.all_gradients, self.done + share)

    def _note(self, place: Place, kept: int, workspace: int) -> None:
        sizes, part = self.sizes, place.part
        gathered = sizes.kept_whole
        if part != OUTSIDE:
            # The unit at work, and the one after it, which is on its way.
            gathered += 2 * sizes.gathered.get(part, 0)
        elif not sizes.kept_whole:
            gathered += sizes.gathered.get(part, 0)
        gradients = self.done
        if place.backward:
            gradients += sizes.gathered.get(part, 0) + sizes.summed.get(part, 0)
        now = PeakMemory(
            self.parameters,
            gradients,
            self.optimizer,
            kept,
            workspace,
            gathered,
            self.step.inputs,
            f"{'backward' if place.backward else 'forward'} of {part}",
        )
        if now.total > self.most.total:
            self.most = now
