"""Layers whose rows are several parts one after the other, each split by its heads.

The projection of Mamba-2 makes a gate, x, B, C and a step of one product, and its convolution has
x, B and C in a row. A rank of tp needs its heads' rows of each part; what it holds are as many
rows, one after the other, so a checkpoint has one weight, in the shape that its model has, on any
mesh. The rows that it lacks come from the others when the layer is called.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from dtcp.distributed.collectives import all_to_all
from dtcp.parallelize.tensor_parallel.distribute import distribute_parameter
from dtcp.parallelize.tensor_parallel.local_params import LocalParams, keep_local_form

RowRun = tuple[int, int]
"""Rows from one to before another."""


class Segment(NamedTuple):
    """A part of a layer's rows.

    Args:
        rows: of the part.
        pieces: of equal size, of which each rank has as many; or one, which it shares with others
            where there are fewer pieces than ranks.
    """

    rows: int
    pieces: int

    def divides(self, tp: int) -> bool:
        """Whether each rank of tp can have as many rows."""
        fits = self.pieces % tp == 0 or tp % self.pieces == 0
        return self.rows % self.pieces == 0 and fits

    def local(self, tp: int) -> int:
        """The rows that a rank has."""
        return self.rows // min(tp, self.pieces)

    def start(self, tp: int, rank: int) -> int:
        """The first of them, in the part."""
        return rank * min(tp, self.pieces) // tp * self.local(tp)


def rows_of_heads(segments: Sequence[Segment], tp: int, rank: int) -> list[RowRun]:
    """The rows that a rank has of a layer, part by part."""
    firsts = accumulate((each.rows for each in segments), initial=0)
    starts = [first + each.start(tp, rank) for first, each in zip(firsts, segments, strict=False)]
    return [(a, a + each.local(tp)) for a, each in zip(starts, segments, strict=True)]


def cut(x: Tensor, runs: Iterable[RowRun], dim: int = 0) -> Tensor:
    """The rows of some runs, one after the other."""
    return torch.cat([x.narrow(dim, a, b - a) for a, b in runs], dim)


@dataclass
class SegmentRows(LocalParams):
    """LocalParams with the rows of this rank's heads, in each of the parts of the layer.

    A weight whose rows the axis does not divide is whole on each rank, and cut there.

    Args:
        segments: the parts of the layer's rows.

    Traffic per rank: the rows that others hold and this rank computes with; backward, their
    gradients.
    """

    segments: tuple[Segment, ...] = field(default=(), kw_only=True)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        tp, rank = device_mesh.size(), device_mesh.get_local_rank()
        rows = sum(each.rows for each in self.segments)
        placement: Placement = Replicate() if rows % tp else Shard(0)
        for name, _ in list(module.named_parameters(recurse=False)):
            distribute_parameter(module, name, device_mesh, placement)
        runs = rows_of_heads(self.segments, tp, rank)
        route = RowRoute.of(self.segments, tp, rank)

        def cut_out(x: DTensor) -> Tensor:
            return cut(x.to_local(grad_placements=[Partial()]), runs)

        def exchanged(x: DTensor) -> Tensor:
            return route.exchange(x.to_local(grad_placements=[Shard(0)]), device_mesh)

        keep_local_form(module, cut_out if placement.is_replicate() else exchanged)
        return self.run_on_local(module)


class RowRoute(NamedTuple):
    """How the rows of a rank's heads come from those that all ranks hold, one after the other.

    Args:
        sent_rows: of the rows that this rank holds, those that it sends, rank by rank.
        send, receive: how many to and from each rank.
        places: where each run of rows lies in what comes, in the order of the layer.
    """

    sent_rows: list[RowRun]
    send: list[int]
    receive: list[int]
    places: list[RowRun]

    @classmethod
    def of(cls, segments: Sequence[Segment], tp: int, rank: int) -> "RowRoute":
        """The route of one rank."""
        rows = sum(each.rows for each in segments) // tp
        held = [(each * rows, (each + 1) * rows) for each in range(tp)]
        wanted = rows_of_heads(segments, tp, rank)
        sent = [_common(rows_of_heads(segments, tp, each), held[rank]) for each in range(tp)]
        come = [_common(wanted, each) for each in held]
        runs = [run for each in come for run in each]
        ends = list(accumulate(map(_length, runs), initial=0))
        order = sorted(range(len(runs)), key=lambda each: runs[each])
        return cls(
            [(a - rank * rows, b - rank * rows) for each in sent for a, b in each],
            [sum(map(_length, each)) for each in sent],
            [sum(map(_length, each)) for each in come],
            [(ends[each], ends[each + 1]) for each in order],
        )

    def exchange(self, local: Tensor, mesh: DeviceMesh) -> Tensor:
        """The rows of this rank's heads."""
        out = cut(local, self.sent_rows) if self.sent_rows else local[:0]
        come = all_to_all(out, mesh, receive=self.receive, send=self.send)
        return cut(come, self.places)


def _length(run: RowRun) -> int:
    return run[1] - run[0]


def _common(runs: Iterable[RowRun], held: RowRun) -> list[RowRun]:
    """What of some runs is held."""
    both = [(max(a, held[0]), min(b, held[1])) for a, b in runs]
    return [(a, b) for a, b in both if a < b]
