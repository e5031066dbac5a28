"""Schedules of pipeline stages, with inputs that are cut into micro-batches already."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

OnePiece = ScheduleGPipe | Schedule1F1B | ScheduleInterleaved1F1B | ScheduleLoopedBFS
ONE_PIECE = (ScheduleGPipe, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleLoopedBFS)
"""Those that run a micro-batch's backward in one piece."""
TwoPieces = ScheduleInterleavedZeroBubble | ScheduleZBVZeroBubble | ScheduleDualPipeV
TWO_PIECES = (ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble, ScheduleDualPipeV)
"""Those that compute gradients of a stage's inputs first, and of its weights when there is time."""
Schedule = OnePiece | TwoPieces


def step_cut(
    schedule: Schedule,
    arg_mbs: Sequence[tuple[Any, ...]],
    kwarg_mbs: Sequence[Mapping[str, Any]],
    target_mbs: Sequence[Any] | None,
    losses: list[Any] | None,
    loss_kwargs: Mapping[str, Any],
) -> None:
    """`schedule.step(arg_mbs=..., ...)`, public from 2.14 on; in 2.13 what its `step` does."""
    cut: dict[str, Any] = {
        "arg_mbs": list(arg_mbs),
        "kwarg_mbs": [dict(each) for each in kwarg_mbs],
        "target_mbs": None if target_mbs is None else list(target_mbs),
        "losses": losses,
        "return_outputs": False,
        "loss_kwargs": dict(loss_kwargs),
    }
    if torch.__version__ >= "2.14":
        schedule.step(**cut)
        return
    for stage in stages_of(schedule):
        stage.has_backward = schedule._has_backward
        stage.clear_runtime_states()
    schedule._step_microbatches(**cut)


@contextmanager
def without_backward(schedule: Schedule) -> Iterator[None]:
    """Inside, steps of a schedule run forward alone; what its `eval` does (2.13-2.15)."""
    before = schedule._has_backward
    schedule._has_backward = False
    try:
        yield
    finally:
        schedule._has_backward = before


def stages_of(schedule: Schedule) -> list[Any]:
    """The stages that this rank holds (2.13-2.15)."""
    if isinstance(schedule, (ScheduleGPipe, Schedule1F1B)):
        return [schedule._stage]
    return list(schedule._stages)


def micro_batches_of(schedule: Schedule) -> int:
    """How many a step has (2.13-2.15)."""
    return int(schedule._n_microbatches)


def has_loss(schedule: Schedule) -> bool:
    """Whether it was given a loss_fn, without which nothing runs backward (2.13-2.15)."""
    return schedule._loss_fn is not None
