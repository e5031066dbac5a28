"""A step of a pipeline schedule over micro-batches that were sharded one by one.

What a schedule of torch's is given it cuts along dim 0 into micro-batches. What mixers read of a
batch cannot be cut: each micro-batch has documents of its own. So each is sharded by itself, on
the host, and every stage gets its metadata with it.

    micro-batch       0           1           2
    stage 0     x, metadata  x, metadata  x, metadata       pp rank 0
    stage 1        metadata     metadata     metadata       pp rank 1, with labels: the last one
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule

from dtcp._torch.pipelining import (
    ONE_PIECE,
    TWO_PIECES,
    Schedule,
    has_loss,
    micro_batches_of,
    stages_of,
    step_cut,
    without_backward,
)
from dtcp.copied_weights import COPIED
from dtcp.cut_backward import check_backward_can_be_cut, check_gradients_arrived
from dtcp.experts.losses import RouterLoss
from dtcp.huggingface.stages import weights_elsewhere
from dtcp.metadata import BatchMetadata
from dtcp.sequence.arguments import check_kind

Shapes = dict[str, torch.Size]
SENT = "_dtcp_shapes_of_microbatches"
"""Where a schedule that has made a step keeps the shapes of what its stages send each other."""


def step_microbatches(
    schedule: Schedule,
    *,
    arg_mbs: Sequence[tuple[Any, ...]],
    kwarg_mbs: Sequence[Mapping[str, Any]],
    target_mbs: Sequence[Tensor],
    loss_kwargs: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Run all micro-batches forward and backward; gradients are added up in the stages' parameters.

    All ranks of all stages call it. As `schedule.step(arg_mbs=..., ...)` of torch 2.14, on 2.13 as
    well. Losses of routers whose `parts` nobody has set are divided by the number of micro-batches.
    The first step compares stages' names of parameters, and warns of one that two have: a
    checkpoint would keep one of them. It runs its first micro-batch twice where stages were not
    given shapes (`input_args`, `output_args`).

    Args:
        schedule: with a loss_fn that is a share of the whole step's, as token_mean_loss is, and
            scale_grads=False.
        arg_mbs: of each micro-batch, what the first stage is called with; other stages ignore it.
        kwarg_mbs: of each micro-batch, what every stage is called with besides: `attn_metadata`
            and position ids, say.
        target_mbs: of each micro-batch, what loss_fn gets after the output of the last stage.
        loss_kwargs: what it gets by name: global_tokens, of all micro-batches together.
    Returns:
        the loss of each micro-batch where the last stage is; elsewhere none.
    Raises:
        TypeError: a schedule of another kind, or that is none.
        ValueError: a schedule that scales gradients or has no loss; more or fewer micro-batches
            than it has; micro-batches of different shapes; under no_grad; a schedule that cuts
            backward passes in two, where stages do not let it (`check_backward_can_be_cut`; in the
            first step on all ranks), or that leaves out weights of theirs in the first step.
    """
    _check_schedule(schedule)
    known: Shapes | None = vars(schedule).get(SENT)
    first = _check_micro_batches(schedule, known, arg_mbs, kwarg_mbs, target_mbs)
    _check_stages(schedule, first_step=known is None)
    losses: list[Tensor] = []
    with _router_losses_in_parts(schedule):
        step_cut(schedule, arg_mbs, kwarg_mbs, target_mbs, losses, loss_kwargs or {})
    if known is None:
        _check_gradients(schedule)
    vars(schedule)[SENT] = first
    return [loss.detach() for loss in losses]


@torch.no_grad()
def run_forward(
    schedule: Schedule,
    *,
    arg_mbs: Sequence[tuple[Any, ...]],
    kwarg_mbs: Sequence[Mapping[str, Any]],
    target_mbs: Sequence[Tensor],
    loss_kwargs: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Run all micro-batches forward alone, to validate: as `step_microbatches`, without gradients.

    Put the stages into eval mode before. Where they were not given shapes (`input_args`,
    `output_args`), it runs its first micro-batch twice, and so does the step that follows it.

    Returns:
        the loss of each micro-batch where the last stage is; elsewhere none.
    Raises:
        TypeError, ValueError: as step_microbatches.
        ValueError: weights with gradients, which torch (2.13) drops where FSDP shards them, when a
            schedule turns from steps to this, and back.
    """
    _check_kind_of(schedule)
    _check_micro_batches(schedule, vars(schedule).get(SENT), arg_mbs, kwarg_mbs, target_mbs)
    modules = [stage.submod for stage in stages_of(schedule)]
    kept = (name for x in modules for name, p in x.named_parameters() if p.grad is not None)
    if (name := next(kept, None)) is not None:
        raise ValueError(
            f"Stages run forward alone between steps of the optimizer, got a gradient of {name}, "
            f"which torch would drop: step the optimizer before, and set gradients to None."
        )
    losses: list[Tensor] = []
    with without_backward(schedule):
        step_cut(schedule, arg_mbs, kwarg_mbs, target_mbs, losses, loss_kwargs or {})
    for module in modules:
        for unit in module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()  # what no backward pass will do
    return losses


def _check_micro_batches(
    schedule: Schedule,
    known: Shapes | None,
    arg_mbs: Sequence[tuple[Any, ...]],
    kwarg_mbs: Sequence[Mapping[str, Any]],
    target_mbs: Sequence[Tensor],
) -> Shapes:
    """Refuse more or fewer micro-batches than a schedule has, and shapes that are not one.

    Args:
        known: the shapes of an earlier step.
    Returns:
        those of all.
    """
    named: dict[str, Any] = {"arg_mbs": arg_mbs, "kwarg_mbs": kwarg_mbs, "target_mbs": target_mbs}
    for name, each in named.items():
        check_kind("A step of micro-batches", Sequence, **{name: each})
        if len(each) != micro_batches_of(schedule):
            raise ValueError(
                f"A schedule has {micro_batches_of(schedule)} micro-batches in a step, got "
                f"{len(each)} in {name}: build it with n_microbatches={len(each)}."
            )
    shapes = [_shapes(*parts) for parts in zip(arg_mbs, kwarg_mbs, strict=True)]
    # Stages keep the buffers that they receive in from the first step on.
    first = shapes[0] if known is None else known
    for number, own in enumerate(shapes):
        if own != first:
            raise ValueError(
                f"Stages send each other micro-batches of one shape, got {own} in micro-batch "
                f"{number} and {first} in the first one of all: pad rows to one length, by buckets."
            )
    return first


def _check_schedule(schedule: Schedule) -> None:
    if not torch.is_grad_enabled():
        raise ValueError(
            "A step of micro-batches has backward passes, got one under no_grad or inference_mode: "
            "leave it for the step, or run micro-batches forward alone, by run_forward."
        )
    _check_kind_of(schedule)


def _check_kind_of(schedule: Schedule) -> None:
    if torch.__version__ < "2.13":
        raise NotImplementedError(
            f"Losses of micro-batches are divided by the tokens of all of them, which schedules of "
            f"this torch hand on to no loss_fn, got torch {torch.__version__}: use 2.13 or newer."
        )
    check_kind(
        "A step of micro-batches",
        (*ONE_PIECE, *TWO_PIECES),
        "use one of these, whose gradients are known to be right",
        schedule=schedule,
    )
    if schedule.scale_grads:
        raise ValueError(
            "Losses are shares of a step's, whose gradients are summed, got a schedule with "
            "scale_grads=True, which divides them by the number of micro-batches: build it with "
            "scale_grads=False."
        )
    if not has_loss(schedule):
        raise ValueError(
            "A step of micro-batches has backward passes, got a schedule without loss_fn: build it "
            "with one on every rank, token_mean_loss say."
        )


def _check_stages(schedule: Schedule, *, first_step: bool) -> None:
    """Refuse stages whose backward passes cannot be cut; in the first step, compare them."""
    if isinstance(schedule, TWO_PIECES):
        with _refused_by_all(schedule) if first_step else nullcontext():
            for stage in stages_of(schedule):
                check_backward_can_be_cut(stage.submod)
    if first_step:
        with _refused_by_all(schedule):
            _check_copies(schedule)
        _warn_of_shared_names(schedule)


def _check_copies(schedule: Schedule) -> None:
    """Refuse a weight of a model of transformers that two of its stages would train apart."""
    for stage in stages_of(schedule):
        copies = weights_elsewhere(stage.submod).copies
        left = sorted(copies.difference(vars(schedule).get(COPIED, ())))
        if left:
            raise ValueError(
                f"A weight that two stages of a model hold is one weight, got {left[0]} of stage "
                f"{stage.stage_index}, which is trained apart from the first stage's: make "
                f"CopiedWeights(schedule, ..) of both names (docs/pipeline.md)."
            )


def _check_gradients(schedule: Schedule) -> None:
    if isinstance(schedule, TWO_PIECES):
        with _refused_by_all(schedule):
            check_gradients_arrived((s.stage_index, s.submod) for s in stages_of(schedule))


@contextmanager
def _refused_by_all(schedule: Schedule) -> Iterator[None]:
    """Raise a ValueError of one rank's stages on the ranks of all, which would wait for it."""
    refused = ""
    try:
        yield
    except ValueError as error:
        refused = str(error)
    of_ranks = _of_all_stages(refused, schedule)
    if any(of_ranks):
        raise ValueError(refused or next(filter(None, of_ranks)))


@contextmanager
def _router_losses_in_parts(schedule: Schedule) -> Iterator[None]:
    """Divide losses of routers by the number of micro-batches, for one step of this schedule."""
    modules = (module for stage in stages_of(schedule) for module in stage.submod.modules())
    unset = [x for x in modules if isinstance(x, RouterLoss) and x.parts == 1]
    try:
        for loss in unset:
            loss.parts = micro_batches_of(schedule)
        yield
    finally:
        for loss in unset:
            loss.parts = 1


def _warn_of_shared_names(schedule: Schedule) -> None:
    """Compare the names of parameters over all stages: a checkpoint keeps tensors by name."""
    stages = stages_of(schedule)
    copied = vars(schedule).get(COPIED, ())  # which have one content
    named = {s.stage_index: [name for name, _ in s.submod.named_parameters()] for s in stages}
    own = {index: [x for x in names if x not in copied] for index, names in named.items()}
    of_ranks = _of_all_stages(own, schedule)
    stage_of: dict[str, int] = {}
    for index, names in sorted(item for rank in of_ranks for item in rank.items()):
        for name in names:
            if stage_of.setdefault(name, index) != index:
                warnings.warn(
                    f"A checkpoint keeps tensors by name and one of each, got {name!r} in stages "
                    f"{stage_of[name]} and {index}: if you save both in one, name layers by their "
                    f"number in the whole model, nn.ModuleDict({{str(number): layer}}) say.",
                    stacklevel=4,
                )
                return


def _of_all_stages(value: Any, schedule: Schedule) -> list[Any]:
    """What each pp rank has."""
    stage = stages_of(schedule)[0]
    values = [value] * stage.group_size
    dist.all_gather_object(values, value, group=stage.group)
    return values


def _shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Shapes:
    """Shapes of what follows stages from one to the next: of arguments, and of metadata's tokens.

    Other keyword arguments go to each stage as they are, and may have a shape for each micro-batch.
    """
    sent: dict[str, Any] = {f"argument {i}": x for i, x in enumerate(args)}
    sent |= {name: x.real for name, x in kwargs.items() if isinstance(x, BatchMetadata)}
    return {name: x.shape for name, x in sent.items() if isinstance(x, Tensor)}
