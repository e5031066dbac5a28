"""The most memory of a rank in a step, put together from one block of each kind."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from dtcp.planner.gathered_weights import GatheredWeights, Moment, UnitBytes
from dtcp.planner.setup import Setup
from dtcp.planner.sharded_weights import Unit, UnitRole
from dtcp.planner.step import StepNumbers
from dtcp.planner.trace import OUTSIDE, Place, Stretch


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of one rank at its fullest moment.

    Args:
        parameters: this rank's shards.
        gradients: shards summed so far, and whole gradients that are still to be summed.
        optimizer: its states, of this rank's shards.
        activations: kept for the backward pass.
        workspace: what the part at work holds beside what it keeps.
        gathered: whole parameters of the units at work, and what they arrive in.
        inputs: the batch, what mixers read of it, and the model's buffers.
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
    walk = _Walk(step, setup)
    walk.forward()
    walk.backward()
    return walk.most


def least_memory(units: Sequence[Unit], setup: Setup) -> int:
    """A lower bound in bytes: weights, gradients and the optimizer alone, at the end of a pass.

    Known before a step is run; `peak_memory` adds what the step keeps and works on.
    """
    precision, total = setup.precision, 0
    for unit in units:
        held = unit.numbers(setup.degrees) * precision.master.itemsize * (1 + precision.states)
        total += unit.count * (held + UnitBytes.of(unit, setup).kept)
    return total


def _order(step: StepNumbers) -> list[tuple[str, str]]:
    """(block, its kind) in the order of the model."""
    places = {name: kind.name for kind in step.kinds for name in kind.blocks}
    return [(name, places[name]) for name in sorted(places, key=_natural)]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


@dataclass(frozen=True)
class _Block:
    """A block of the model.

    Args:
        was_run: whether it is the one of its kind that was.
    """

    part: str
    unit: UnitBytes
    was_run: bool


class _Walk:
    """A step in the order of the model: FSDP's events, and the stretches between them."""

    def __init__(self, step: StepNumbers, setup: Setup) -> None:
        self.setup, self.most, self.kept = setup, PeakMemory(), 0
        precision = setup.precision
        width = precision.master.itemsize
        numbers = sum(unit.numbers(setup.degrees) * unit.count for unit in step.units)
        self.parameters = numbers * width
        self.optimizer = precision.states * numbers * width
        self.inputs = step.inputs
        by_role: dict[UnitRole, list[UnitBytes]] = {role: [] for role in UnitRole}
        by_part: dict[str, UnitBytes] = {}
        for unit in step.units:
            by_role[unit.role].append(UnitBytes.of(unit, setup))
            if unit.part:
                by_part[unit.part] = by_role[unit.role][-1]
        nothing = UnitBytes(*[0] * len(fields(UnitBytes)))
        self.blocks = [
            _Block(kind, by_part.get(kind, nothing), was_run=name == kind)
            for name, kind in _order(step)
        ]
        self.root, self.first, self.last = (
            by_role[role] for role in (UnitRole.ROOT, UnitRole.FIRST, UnitRole.LAST)
        )
        accumulates = setup.micro_batches > 1
        self.weights = GatheredWeights(
            accumulates=accumulates,
            copies=precision.reduce != precision.master,
            replicas=setup.degrees.dp_replicate > 1,
            done=numbers * width if accumulates else 0,
        )
        self.stretches = step.trace.stretches

    def of(self, part: str, *, backward: bool) -> list[Stretch]:
        """The stretches of a block's one pass."""
        return [s for s in self.stretches if s.place == Place(part, backward=backward)]

    def outside(self, *, backward: bool) -> tuple[list[Stretch], dict[str, list[Stretch]]]:
        """Those before the blocks of a pass; and those after each block that was run, by part."""
        before: list[Stretch] = []
        after: dict[str, list[Stretch]] = {}
        current = before
        for stretch in (s for s in self.stretches if s.place.backward == backward):
            if stretch.place.part != OUTSIDE:
                current = after.setdefault(stretch.place.part, [])
            else:
                current.append(stretch)
        if not after and not backward:
            return before[:1], {"": before[1:]}
        return before, after

    def forward(self) -> None:
        weights, reshard, place = self.weights, self.setup.reshard, Place()
        before, between = self.outside(backward=False)
        # What follows the last of those that were run follows all blocks.
        *_, after = between.values()
        for index, unit in enumerate(self.root):
            self.note(place, weights.gather(_ROOT + index, unit))
        for index, unit in enumerate(self.first):
            self.note(place, weights.gather(_FIRST + index, unit))
        self.run(before)
        for index in range(len(self.first) if reshard else 0):
            weights.free(_FIRST + index)
        for index, block in enumerate(self.blocks):
            self.note(Place(block.part), weights.gather(index, block.unit))
            self.run(self.of(block.part, backward=False))
            if reshard:
                weights.free(index)
            if block.was_run and between[block.part] is not after:
                self.run(between[block.part])
        for index, unit in enumerate(self.last):
            self.note(place, weights.gather(_LAST + index, unit))
        self.run(after[:-1])
        weights.end_forward()
        self.run(after[-1:])

    def backward(self) -> None:
        weights, place = self.weights, Place(backward=True)
        before, between = self.outside(backward=True)
        *_, after = [[], *between.values()]
        self.run(before[:1])
        # What is gathered in the backward pass, in its order.
        order = [(i, block.unit) for i, block in enumerate(self.blocks)][::-1]
        order += [(_FIRST + i, unit) for i, unit in enumerate(self.first)][::-1]
        following = dict(zip([key for key, _ in order], order[1:], strict=False))
        self.note(place, weights.prefetch(*order[0]) if order else [])
        self.run(before[1:])
        for index, unit in enumerate(self.last):
            self.finish(_LAST + index, unit, place, before[-1:])
        first = {b.part: i for i, b in reversed(list(enumerate(self.blocks)))}
        for index, block in reversed(list(enumerate(self.blocks))):
            there = Place(block.part, backward=True)
            stretches = self.of(block.part, backward=True)
            self.note(there, weights.gather_again(index, block.unit))
            if index in following:
                self.note(there, weights.prefetch(*following[index]))
            self.run(stretches)
            if index != first[block.part]:
                self.kept += self.shared(block.part)
            self.finish(index, block.unit, there, stretches)
            if block.was_run and between.get(block.part, after) is not after:
                self.run(between[block.part])
        for index, unit in enumerate(self.first):
            self.note(place, weights.gather_again(_FIRST + index, unit))
        self.run(after)
        left = sum(unit.gradients for unit in (*self.root, *self.first))
        for keys, units in ((_ROOT, self.root), (_FIRST, self.first)):
            for index, unit in enumerate(units):
                left -= unit.gradients
                self.note(place, weights.sum_up(keys + index, unit, left))
        weights.settle()
        self.note(place, [weights.now])

    def shared(self, part: str) -> int:
        """Bytes made outside of a block, for all of its kind, that went with the one that was run.

        Cosines of positions and masks, say. What comes in and what goes out are of one size.
        """
        passes = (self.of(part, backward=backward) for backward in (False, True))
        return max(0, sum(s.start - s.end for each in passes for s in each))

    def finish(self, key: int, unit: UnitBytes, place: Place, stretches: list[Stretch]) -> None:
        """FSDP sums the gradients of a unit."""
        others = stretches[-1].grads_left if stretches else 0
        self.note(place, self.weights.sum_up(key, unit, others))

    def run(self, stretches: Iterable[Stretch]) -> None:
        """Go through the stretches of a part once."""
        for stretch in stretches:
            change = stretch.end - stretch.start
            kept = min(self.kept, self.kept + change)
            now = self.weights.now
            moment = Moment(now.gathered, now.gradients + stretch.grads)
            workspace = self.kept + stretch.peak - stretch.start - kept
            self.note(stretch.place, [moment], kept=kept, workspace=workspace)
            self.kept += change

    def note(
        self,
        place: Place,
        moments: Iterable[Moment],
        *,
        kept: int | None = None,
        workspace: int = 0,
    ) -> None:
        """Keep the moment if it is the fullest."""
        for moment in moments:
            now = PeakMemory(
                parameters=self.parameters,
                gradients=moment.gradients,
                optimizer=self.optimizer,
                activations=self.kept if kept is None else kept,
                workspace=workspace,
                gathered=moment.gathered,
                inputs=self.inputs,
                where=f"{'backward' if place.backward else 'forward'} of {place.part}",
            )
            if now.total > self.most.total:
                self.most = now


_ROOT, _FIRST, _LAST = -3000, -2000, -1000
"""Keys of units outside of blocks, which count from 0."""
