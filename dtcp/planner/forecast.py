"""The numbers of a run: bytes by axis, memory by what it is for, FLOPs."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from math import gcd

from torch.distributed.device_mesh import init_device_mesh

from dtcp._torch.fakes import fake_ranks
from dtcp.distributed.groups import group_name
from dtcp.distributed.mesh import AXES, Degrees, ParallelMesh
from dtcp.distributed.moves import Moved
from dtcp.distributed.nodes import neighbours_on_cp
from dtcp.distributed.ops import moves_of
from dtcp.metadata import BatchMetadata
from dtcp.mixer import ClaimedMixer
from dtcp.planner.axis_bytes import (
    NO_GROUPS,
    AxisBytes,
    expert_moves,
    note_other_groups,
    over_cp,
    torch_bytes,
)
from dtcp.planner.captured_warnings import captured_warnings
from dtcp.planner.even_routes import EXPERT_OPS, ExpertMoves
from dtcp.planner.mixer_flops import mixer_flops
from dtcp.planner.peak import PeakMemory, peak_memory
from dtcp.planner.setup import Setup
from dtcp.planner.step import StepNumbers, TracedStep, styles_of, trace_step
from dtcp.planner.subject import Subject
from dtcp.planner.trace import Place
from dtcp.sequence.layout import SequenceLayout

MOST_RANKS = 8
"""How many ranks of the axis cp are traced at most."""


@dataclass(frozen=True)
class MixerBytes:
    """What the mixers of one kind of block move and compute on one rank, in one micro-batch."""

    part: str
    count: int
    forward: Moved = field(default_factory=Moved)
    backward: Moved = field(default_factory=Moved)
    forward_flops: int = 0
    backward_flops: int = 0


def from_other_nodes(moved: Moved, cp_rank: int, stride: int, ranks_per_node: int) -> int:
    """Bytes that a rank of cp receives from them, where neighbours are `stride` ranks apart."""
    own = cp_rank * stride // ranks_per_node
    return sum(
        size for peer, size in enumerate(moved.received) if peer * stride // ranks_per_node != own
    )


@dataclass(frozen=True)
class RankForecast:
    """What differs between the ranks of the axis cp."""

    cp_rank: int
    mixers: tuple[MixerBytes, ...]

    @property
    def received(self) -> AxisBytes:
        """Over the axis cp, in one micro-batch."""
        return AxisBytes(
            sum(each.count * sum(each.forward.received) for each in self.mixers),
            sum(each.count * sum(each.backward.received) for each in self.mixers),
        )

    def crossing(self, stride: int, ranks_per_node: int) -> AxisBytes:
        """Bytes of them from other nodes, where neighbours on cp are `stride` ranks apart."""
        where = self.cp_rank, stride, ranks_per_node
        return AxisBytes(
            sum(each.count * from_other_nodes(each.forward, *where) for each in self.mixers),
            sum(each.count * from_other_nodes(each.backward, *where) for each in self.mixers),
        )

    @property
    def flops(self) -> int:
        """Of mixers, in one micro-batch."""
        return sum(each.count * (each.forward_flops + each.backward_flops) for each in self.mixers)


@dataclass(frozen=True)
class Forecast:
    """A run, before it is run.

    Args:
        by_axis: bytes received in a step, by axis: dp_replicate, fsdp, edp (weights of experts),
            tp, loss, and ep, where experts are chosen evenly; alike on all ranks. Those of cp are
            in `ranks`.
        ranks: of the axis cp that were traced.
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
    experts: tuple[ExpertMoves, ...] = ()
    """What experts move over ep in a micro-batch, by kind of block."""
    styles: tuple[str, ...] = ()
    """As of RowForecast."""
    warnings: tuple[str, ...] = ()
    """As of RowForecast."""
    layout: SequenceLayout | None = None
    """As of RowForecast."""

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

    def crossing_cp(self, ranks_per_node: int) -> AxisBytes:
        """Bytes a step that come from other nodes to the rank that receives most over cp."""
        crossing = self.busiest.crossing(self.setup.degrees.tp, ranks_per_node)
        return crossing.times(self.setup.micro_batches)

    def crossing_ep(self, ranks_per_node: int) -> AxisBytes:
        """Bytes a step that experts bring from other nodes."""
        each = [AxisBytes(*moves.received(ranks_per_node)) for moves in self.experts]
        return sum(each, AxisBytes()).times(self.setup.micro_batches)

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
    return assembled(subject, setup, forecast_row(subject, setup, chosen))


@dataclass(frozen=True)
class RowForecast:
    """A step of the ranks of one row, cp x tp: that of one rank, and what differs on others."""

    step: StepNumbers
    ranks: tuple[RankForecast, ...]
    experts: tuple[ExpertMoves, ...]
    styles: tuple[str, ...]
    """How the mixers of each kind of block are carried out, a line each."""
    warnings: tuple[str, ...]
    """Of the model's plan on this mesh: what is whole on each rank, for instance."""
    layout: SequenceLayout


def forecast_row(subject: Subject, setup: Setup, chosen: Sequence[int]) -> RowForecast:
    """One row's ranks: what does not depend on how many rows there are, nor on who has weights."""
    degrees = row_degrees(setup.degrees)
    with captured_warnings() as said, fake_ranks(degrees.world, chosen[0] * degrees.tp):
        step = trace_step(subject, _row_mesh(degrees, row_ranks_per_node(setup)), setup)
        forecasts = [_rank_forecast(step, chosen[0], step.sharded.attn_metadata)]
        experts = expert_moves(step)
        note_other_groups(step)
    for rank in chosen[1:]:
        # Of other ranks only what they move over cp is needed.
        with fake_ranks(degrees.cp, rank):
            groups = _groups_here(step, _row_mesh(Degrees(cp=degrees.cp)))
            forecasts.append(_rank_forecast(step, rank, metadata_of(step, rank), groups))
    return RowForecast(
        step.numbers(),
        tuple(forecasts),
        experts=experts,
        styles=tuple(_style_lines(step)),
        warnings=tuple(said),
        layout=step.sharded.layout,
    )


def _row_mesh(degrees: Degrees, ranks_per_node: int = 0) -> ParallelMesh:
    """A mesh of the axes of several ranks; each axis of one rank would take a group per rank."""
    wide = [axis for axis in AXES if getattr(degrees, axis) > 1]
    # Weights of experts need an axis of other weights beside theirs.
    narrow = [] if {"dp_shard", "cp"} & {*wide} else ["dp_shard"]
    axes = [axis for axis in AXES if axis in (*wide, *narrow)]
    sizes = tuple(getattr(degrees, axis) for axis in axes)
    device_mesh = init_device_mesh("cpu", sizes, mesh_dim_names=tuple(axes))
    return ParallelMesh.from_device_mesh(
        device_mesh, ep=degrees.ep, etp=degrees.etp, ranks_per_node=ranks_per_node
    )


def _style_lines(step: TracedStep) -> Iterator[str]:
    """What carries out the mixers of each kind of block."""
    for kind in step.kinds:
        block = step.model.get_submodule(kind.name)
        styles = [f"{m.style}" for m in block.modules() if isinstance(m, ClaimedMixer)]
        if styles:
            yield f"{kind.name} (x {kind.count}): {', '.join(dict.fromkeys(styles))}"


def row_degrees(degrees: Degrees) -> Degrees:
    """The ranks of one row, or of as many rows as share experts."""
    row, spread = degrees.cp * degrees.tp, degrees.ep * degrees.etp
    return replace(degrees, dp_replicate=1, dp_shard=spread // gcd(spread, row))


def row_ranks_per_node(setup: Setup) -> int:
    """Ranks of a node among those of a row, which are the first of the run; 0: all.

    Raises:
        ValueError: nodes that cut cp into unequal parts, somewhere in the run.
    """
    degrees = row_degrees(setup.degrees)
    neighbours_on_cp(degrees.cp, degrees.tp, setup.ranks_per_node)
    return setup.ranks_per_node if setup.ranks_per_node < degrees.world else 0


def _groups_here(step: TracedStep, mesh: ParallelMesh) -> dict[str, str]:
    """The names that this rank has for the groups of the trace: they count a rank's groups."""
    if mesh.cp is None:
        return {}
    here = [group_name(mesh.cp)]
    for style in styles_of(step.model):
        # A copy, for a style keeps the groups that it makes.
        here += copy(style).groups(mesh.cp)
    return dict(zip(step.groups, here, strict=True))


def assembled(subject: Subject, setup: Setup, row: RowForecast) -> Forecast:
    """The whole model's numbers, from one block of each kind."""
    step = row.step
    by_axis = torch_bytes(step, setup)
    if row.experts:
        there, back = (sum(x) for x in zip(*(x.received() for x in row.experts), strict=True))
        by_axis["ep"] = AxisBytes(there, back).times(setup.micro_batches)
    matmuls = {place: n * step.times(place.part) for place, n in step.trace.flops.items()}
    return Forecast(
        subject.name,
        setup,
        by_axis=by_axis,
        ranks=row.ranks,
        matmul_flops=matmuls,
        parameters=step.parameters,
        memory=peak_memory(step, setup),
        experts=row.experts,
        styles=row.styles,
        warnings=row.warnings,
        layout=row.layout,
    )


def chosen_ranks(cp: int) -> list[int]:
    """Ranks of the axis to trace: all of a short one, else some, evenly spread."""
    if cp <= MOST_RANKS:
        return list(range(cp))
    return sorted({round(i * (cp - 1) / (MOST_RANKS - 1)) for i in range(MOST_RANKS)})


def metadata_of(step: TracedStep, rank: int) -> BatchMetadata:
    """What the mixers of the model read on another rank of the axis."""
    by_key = {}
    for module in step.model.modules():
        if isinstance(module, ClaimedMixer) and module.metadata_key not in by_key:
            sharded = step.sharded
            by_key[module.metadata_key] = module.style.make_metadata(
                module, sharded.coords, sharded.layout, rank
            )
    return BatchMetadata(by_key)


def _rank_forecast(
    step: TracedStep, rank: int, metadata: BatchMetadata, groups: Mapping[str, str] = NO_GROUPS
) -> RankForecast:
    """What a rank's mixers move and compute, of a batch's metadata; the group is this rank's.

    Args:
        groups: names of the trace's process groups in this process, where they differ.
    """
    tensors = {key: metadata[key].tensors() for key in metadata}
    moved: dict[Place, Moved] = defaultdict(Moved)
    flops: dict[Place, int] = defaultdict(int)
    for call in step.trace.calls:
        if over_cp(call, step):
            args, kwargs = call.arguments(tensors, groups)
            moves = moves_of(call.op)
            moved[call.place] += Moved() if moves is None else moves(*args, **kwargs)
            flops[call.place] += mixer_flops(call.op, args)
    mixers = []
    for part in dict.fromkeys(place.part for place in moved):
        there, back = Place(part), Place(part, backward=True)
        passes = moved[there], moved[back], flops[there], flops[back]
        mixers.append(MixerBytes(part, step.times(part), *passes))
    return RankForecast(rank, tuple(mixers))


def received_over_cp(step: TracedStep, metadata: BatchMetadata) -> int:
    """Bytes that this rank receives over cp for a batch, from what is known on the host."""
    tensors = {key: metadata[key].tensors() for key in metadata}
    total = 0
    for call in step.trace.calls:
        if (moves := moves_of(call.op)) is not None and call.op.name() not in EXPERT_OPS:
            args, kwargs = call.arguments(tensors, NO_GROUPS)
            total += step.times(call.place.part) * sum(moves(*args, **kwargs).received)
    return total
