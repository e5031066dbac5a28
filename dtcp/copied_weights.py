"""Weights that several pipeline stages hold: one of them trains each, the others have copies.

A head that is tied to its embedding is in the last stage, the embedding in the first one.

    stage 0   embedding.weight    <- gradient of the copy, before gradients are clipped
    stage 3   lm_head.weight      <- the weight, after the optimizer's step

So a weight has one gradient, one part in the norm and one state in an optimizer, as on one device,
and copies are equal to the bit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from dtcp._torch.pipelining import ONE_PIECE, TWO_PIECES, Schedule, stages_of
from dtcp.distributed.ledger import LEDGER
from dtcp.sequence.arguments import check_kind

COPIED = "_dtcp_copied_weights"
"""Where a schedule keeps the names of weights that several of its stages hold."""
COPIES_OP = "copied_weights"
"""What the ledger calls the traffic of copies."""


@dataclass(frozen=True)
class _Place:
    """Where a weight is: the rank of pp that has the stage, and its name there."""

    rank: int
    stage: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} of stage {self.stage}"


@dataclass(frozen=True)
class _Copy:
    """A copy of a weight, and the weight that an optimizer steps."""

    copy: _Place
    weight: _Place


class CopiedWeights:
    """Weights that several stages hold. All ranks of all stages make one, and call its methods.

    In a step each copy's bytes cross twice between two ranks of pp, as a gradient and as a weight;
    where fsdp and tp shard it, each rank sends its own shard.

    Args:
        schedule: whose stages hold them.
        weights: of each one, its name in every stage that holds it, by the stage's index. The first
            of these stages trains it; give the other stages' to no optimizer (`copies`).
    Raises:
        ValueError: a stage that the schedule lacks, or a parameter that is missing, or another one
            than that of the first stage: of another shape or dtype, or sharded otherwise.
    """

    def __init__(self, schedule: Schedule, weights: Sequence[Mapping[int, str]]) -> None:
        check_kind("Copied weights", (*ONE_PIECE, *TWO_PIECES), schedule=schedule)
        stages = stages_of(schedule)
        self._group, self._rank = stages[0].group, stages[0].group_rank
        self._stages: dict[int, nn.Module] = {x.stage_index: x.submod for x in stages}
        wanted = {name for names in weights for name in names.values()}
        own = {index: _facts(module, wanted) for index, module in self._stages.items()}
        of_ranks: list[Any] = [None] * stages[0].group_size
        # The first exchange of this group is one of all its ranks, too, as NCCL wants it.
        dist.all_gather_object(of_ranks, own, group=self._group)
        self._copies: list[_Copy] = []
        for names in weights:
            weight, *copies = _places(names, of_ranks)
            self._copies.extend(_Copy(copy, weight) for copy in copies)
        vars(schedule)[COPIED] = frozenset(wanted)

    def __str__(self) -> str:
        return ", ".join(f"{x.weight} as {x.copy}" for x in self._copies)

    @property
    def bytes_per_step(self) -> int:
        """What this rank sends, and as much again that it receives."""
        apart = (x for x in self._copies if x.copy.rank != x.weight.rank)
        own = (x for each in apart for x in (each.copy, each.weight) if x.rank == self._rank)
        return sum(_local(self._parameter(x)).nbytes for x in own)

    def copies(self) -> list[nn.Parameter]:
        """Those that this rank's stages have, of weights that other stages train."""
        return [self._parameter(x.copy) for x in self._copies if x.copy.rank == self._rank]

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add gradients of copies to those of their weights, and set them to None.

        After the last micro-batch of a step, before gradients are clipped.
        """

        def taken(each: _Copy) -> Tensor:
            copy = self._parameter(each.copy)
            gradient = _local_gradient(copy)
            copy.grad = None
            return gradient

        def add(each: _Copy, gradient: Tensor) -> None:
            weight = self._parameter(each.weight)
            if weight.requires_grad:
                weight.grad = _like(weight, gradient.add_(_local_gradient(weight)))

        self._exchange(taken, add, home=True)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make copies equal to their weights, after these were drawn, loaded or stepped."""
        self._exchange(
            lambda each: _local(self._parameter(each.weight)),
            lambda each, weight: _local(self._parameter(each.copy)).copy_(weight),
            home=False,
        )

    def _exchange(
        self,
        sent: Callable[[_Copy], Tensor],
        receive: Callable[[_Copy, Tensor], Any],
        *,
        home: bool,
    ) -> None:
        """Send a tensor of each copy to the rank that trains the weight, or back from there."""
        ops, leaving, arriving = [], [], []
        for each in self._copies:
            ends = (each.copy, each.weight) if home else (each.weight, each.copy)
            source, target = (place.rank for place in ends)
            if source == target == self._rank:
                receive(each, sent(each))
            elif source == self._rank:
                leaving.append(sent(each).contiguous())
                ops.append(_op(dist.isend, leaving[-1], self._group, target))
            elif target == self._rank:
                buffer = torch.empty_like(_local(self._parameter(ends[1])).contiguous())
                arriving.append((each, buffer))
                ops.append(_op(dist.irecv, buffer, self._group, source))
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()
        for each, buffer in arriving:
            receive(each, buffer)
        bytes_received = sum(buffer.nbytes for _, buffer in arriving)
        LEDGER.record(COPIES_OP, sent=sum(x.nbytes for x in leaving), received=bytes_received)

    def _parameter(self, place: _Place) -> nn.Parameter:
        return self._stages[place.stage].get_parameter(place.name)


def _op(op: Callable[..., Any], tensor: Tensor, group: Any, peer: int) -> dist.P2POp:
    return dist.P2POp(op, tensor, group=group, group_peer=peer)


def _facts(module: nn.Module, wanted: set[str]) -> dict[str, str]:
    """What a weight and its copies have in common, by name."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {name: _fact(x) for name, x in parameters.items() if name in wanted}


def _fact(parameter: nn.Parameter) -> str:
    sharded = f" as {parameter.placements}" if isinstance(parameter, DTensor) else ""
    own = f"{list(_local(parameter).shape)} of " if sharded else ""
    return f"{own}{list(parameter.shape)} in {parameter.dtype}{sharded}"


def _places(names: Mapping[int, str], of_ranks: Sequence[Mapping[int, Any]]) -> list[_Place]:
    """The stages that hold a weight, that which trains it first."""
    rank_of = {stage: rank for rank, own in enumerate(of_ranks) for stage in own}
    places, known = [], ""
    for stage, name in sorted(names.items()):
        fact = of_ranks[rank_of[stage]][stage].get(name) if stage in rank_of else None
        if fact is None:
            raise ValueError(
                f"A copied weight is a parameter of the stages that are named, got {name!r} of "
                f"stage {stage}, which {'lacks it' if stage in rank_of else 'is none of them'}: "
                f"name the stages of the schedule, and parameters as they have them."
            )
        known = known or fact
        if fact != known:
            raise ValueError(
                f"A weight and its copies are alike, got {name!r} of stage {stage}, {fact}, for "
                f"one of {known} in stage {min(names)}: parallelize the stages by one plan."
            )
        places.append(_Place(rank_of[stage], stage, name))
    return places


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a gradient, sharded as the parameter is; 0 where there is none."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(_local(parameter))
    if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
        gradient = gradient.redistribute(placements=parameter.placements)
    return _local(gradient)


def _like(parameter: nn.Parameter, local: Tensor) -> Tensor:
    """A gradient of a parameter, from this rank's part of it."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
