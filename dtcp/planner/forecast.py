"""The numbers of a run: bytes by axis, memory by what it is for, FLOPs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import Tensor

from dtcp._torch import fake_ranks
from dtcp.distributed.groups import group_name
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.distributed.moves import Moved
from dtcp.distributed.ops import moves_of
from dtcp.metadata import BatchMetadata, MetadataKey
from dtcp.mixer import ClaimedMixer
from dtcp.planner.mixer_flops import mixer_flops
from dtcp.planner.peak import PeakMemory, peak_memory
from dtcp.planner.setup import Setup
from dtcp.planner.step import TracedStep, styles_of, trace_step
from dtcp.planner.subject import Subject
from dtcp.planner.trace import OpCall, Place

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


@dataclass(frozen=True)
class MixerBytes:
    """What the mixers of one kind of block move and compute on one rank, in one micro-batch."""

    part: str
    count: int
    forward: Moved = field(default_factory=Moved)
    backward: Moved = field(default_factory=Moved)
    forward_flops: int = 0
    backward_flops: int = 0


@dataclass(frozen=True)
class RankForecast:
    """What differs from rank to rank of the axis cp."""

    cp_rank: int
    mixers: tuple[MixerBytes, ...]

    @property
    def received(self) -> AxisBytes:
        """Over the axis cp, in one micro-batch."""
        return AxisBytes(
            sum(each.count * sum(each.forward.received) for each in self.mixers),
            sum(each.count * sum(each.backward.received) for each in self.mixers),
        )

    def crossing(self, stride: int, ranks_per_node: int) -> int:
        """Bytes received from other nodes, where neighbours on cp are `stride` ranks apart."""
        per_node = max(1, ranks_per_node // stride)
        return sum(
            each.count * moved.crossing(self.cp_rank, per_node)[1]
            for each in self.mixers
            for moved in (each.forward, each.backward)
        )

    @property
    def flops(self) -> int:
        """Of mixers, in one micro-batch."""
        return sum(each.count * (each.forward_flops + each.backward_flops) for each in self.mixers)


@dataclass(frozen=True)
class Forecast:
    """A run, before it is run.

    Args:
        by_axis: bytes received in a step by torch's collectives, by axis: fsdp, tp, loss; alike
            on all ranks. Those of the axis cp are in `ranks`.
        ranks: of the axis cp that were looked at.
        matmul_flops: of a rank and a micro-batch, forward and backward, without mixers.
        parameters: of the whole model.
        memory: at the peak of a rank's step.
    """

    name: str
    setup: Setup
    by_axis: dict[str, AxisBytes]
    ranks: tuple[RankForecast, ...]
    matmul_flops: dict[Place, int]
    parameters: int
    memory: PeakMemory
    unknown: tuple[str, ...] = ()

    @property
    def busiest(self) -> RankForecast:
        """The rank that receives most over cp."""
        return max(self.ranks, key=lambda rank: rank.received.total)

    @property
    def cp(self) -> AxisBytes:
        """Bytes a step over the axis cp, of the rank that receives most."""
        return self.busiest.received.times(self.setup.micro_batches)

    @property
    def most_mixer_flops(self) -> int:
        return max(rank.flops for rank in self.ranks)

    @property
    def flops(self) -> int:
        """Of the busiest rank and a step, recomputation included."""
        matmuls = sum(self.matmul_flops.values())
        return (matmuls + self.most_mixer_flops) * self.setup.micro_batches


def forecast(subject: Subject, setup: Setup, *, ranks: Sequence[int] | None = None) -> Forecast:
    """Forecast a run on a fake process group; none may exist yet.

    Args:
        ranks: of the axis cp; None for up to eight, evenly spread.
    Raises:
        ValueError: a mesh, layout, strategy or batch that does not suit the model.
    """
    degrees = setup.degrees
    chosen = chosen_ranks(degrees.cp) if ranks is None else list(ranks)
    step, forecasts = look_at(subject, setup, chosen)
    return assembled(subject, setup, step, forecasts)


def look_at(
    subject: Subject, setup: Setup, chosen: Sequence[int]
) -> tuple[TracedStep, list[RankForecast]]:
    """One row's ranks: what does not depend on how many rows there are, nor on who has weights."""
    degrees = Degrees(cp=setup.degrees.cp, tp=setup.degrees.tp)
    with fake_ranks(degrees.world, chosen[0] * degrees.tp):
        step = trace_step(subject, ParallelMesh.from_degrees(degrees, "cpu"), setup)
        forecasts = [rank_forecast(step, chosen[0], step.sharded.attn_metadata)]
    for rank in chosen[1:]:
        with fake_ranks(degrees.world, rank * degrees.tp):
            groups = _groups_here(step, ParallelMesh.from_degrees(degrees, "cpu"))
            forecasts.append(rank_forecast(step, rank, metadata_of(step, rank), groups))
    return step, forecasts


def _groups_here(step: TracedStep, mesh: ParallelMesh) -> dict[str, str]:
    """The names that this rank has for the groups of the trace: they count a rank's groups."""
    if mesh.cp is None:
        return {}
    here = [group_name(mesh.cp)]
    for style in styles_of(step.model):
        # A copy: an instance that makes groups of its own keeps them.
        here += copy(style).groups(mesh.cp)
    return dict(zip(step.groups, here, strict=True))


def assembled(
    subject: Subject, setup: Setup, step: TracedStep, forecasts: Sequence[RankForecast]
) -> Forecast:
    """The whole model's numbers, from one block of each kind."""
    by_axis = torch_bytes(step, setup)
    matmuls = {place: n * step.times(place.part) for place, n in step.trace.flops.items()}
    return Forecast(
        subject.name,
        setup,
        by_axis,
        tuple(forecasts),
        matmuls,
        _whole(step),
        peak_memory(step, setup),
    )


def _whole(step: TracedStep) -> int:
    """Parameters of the whole model, of all its blocks."""
    parts = {kind.name: kind.count for kind in step.kinds}
    total = 0
    for name, p in step.model.named_parameters():
        part = next((part for part in parts if name.startswith(f"{part}.")), "")
        total += p.numel() * parts.get(part, 1)
    return total


def chosen_ranks(cp: int, most: int = 8) -> list[int]:
    """Ranks of the axis to look at: all of a short one, else some, evenly spread."""
    if cp <= most:
        return list(range(cp))
    return sorted({round(index * (cp - 1) / (most - 1)) for index in range(most)})


def metadata_of(step: TracedStep, rank: int) -> BatchMetadata:
    """What the mixers of the model read on another rank of the axis."""
    made = {}
    for module in step.model.modules():
        if isinstance(module, ClaimedMixer) and module.metadata_key not in made:
            sharded = step.sharded
            made[module.metadata_key] = module.style.make_metadata(
                module, sharded.coords, sharded.layout, rank
            )
    return BatchMetadata(made)


def rank_forecast(
    step: TracedStep, rank: int, metadata: BatchMetadata, groups: Mapping[str, str] = NO_GROUPS
) -> RankForecast:
    """What a rank's mixers move and compute, of a batch's metadata; the group is this rank's.

    Args:
        groups: names of the trace's process groups in this process, where they differ.
    """
    tables = {key: metadata[key].tensors() for key in metadata}
    parts: dict[str, MixerBytes] = {}
    for call in step.trace.calls:
        part = call.place.part
        known = parts.get(part, MixerBytes(part, step.times(part)))
        moved, flops = _asked(call, tables, groups)
        if call.place.backward:
            known = replace(
                known,
                backward=known.backward + moved,
                backward_flops=known.backward_flops + flops,
            )
        else:
            known = replace(
                known, forward=known.forward + moved, forward_flops=known.forward_flops + flops
            )
        parts[part] = known
    return RankForecast(rank, tuple(parts.values()))


def _asked(
    call: OpCall, tables: Mapping[MetadataKey, Sequence[Tensor]], groups: Mapping[str, str]
) -> tuple[Moved, int]:
    args, kwargs = call.arguments(tables, groups)
    moves = moves_of(call.op)
    moved = Moved() if moves is None else moves(*args, **kwargs)
    return moved, mixer_flops(call.op, args)


def received_over_cp(step: TracedStep, metadata: BatchMetadata) -> int:
    """Bytes that this rank receives over cp for a batch: what the host's tables alone tell."""
    tables = {key: metadata[key].tensors() for key in metadata}
    total = 0
    for call in step.trace.calls:
        if (moves := moves_of(call.op)) is not None:
            args, kwargs = call.arguments(tables, NO_GROUPS)
            total += step.times(call.place.part) * sum(moves(*args, **kwargs).received)
    return total


def torch_bytes(step: TracedStep, setup: Setup) -> dict[str, AxisBytes]:
    """Bytes that torch's collectives bring a rank in a step, by axis."""
    by_axis: dict[str, AxisBytes] = defaultdict(AxisBytes)
    for (place, group), size in step.trace.collectives.items():
        axis = step.axes.get(group, "other")
        if size:
            times = size * step.times(place.part) * setup.micro_batches
            by_axis[axis] += AxisBytes(*((0, times) if place.backward else (times, 0)))
    by_axis["fsdp"] += fsdp_bytes(step, setup)
    return dict(by_axis)


def fsdp_bytes(step: TracedStep, setup: Setup) -> AxisBytes:
    """Gathers of every unit, once more before backward where it was freed; gradients summed.

    With replicas, the summed shards are summed between them, as an all-reduce moves them.
    """
    degrees, precision = setup.degrees, setup.precision
    ranks, replicas = degrees.dp_shard * degrees.cp, degrees.dp_replicate
    there = back = 0
    for unit in step.units:
        own, summed = unit.own(ranks), 0
        trained = unit.own(ranks, trained=True)
        gather = (ranks - 1) * sum(numel * dtype.itemsize for dtype, numel in own.items())
        for dtype, numel in trained.items():
            # What is kept in its own dtype is summed in it, too.
            width = precision.reduce if dtype == precision.compute else dtype
            summed += numel * width.itemsize
        back += unit.count * (ranks - 1) * summed
        back += unit.count * (2 * (replicas - 1) * summed // replicas)
        there += unit.count * gather
        back += unit.count * gather * unit.resharded
    return AxisBytes(there, back).times(setup.micro_batches)
