"""What one rank decides by itself, in a callback or by its metrics, holds on all ranks.

A callback may look at the clock or at a file, or hear a signal that only its host received. A rank
that then stops, saves or evaluates alone leaves the others waiting for it.
"""

from typing import Any

import torch
from torch import distributed as dist

from dtcp.distributed.mesh import ParallelMesh

DECISIONS = (
    "should_training_stop",
    "should_epoch_stop",
    "should_save",
    "should_evaluate",
    "should_log",
)
"""Fields of a TrainerControl that all ranks act on together."""
DECIDED_AFTER = ("on_substep_end", "on_step_end", "on_epoch_end", "on_evaluate", "on_save")
"""Events that reach all ranks, and after which a Trainer reads what was decided."""


def share_callbacks(handler: Any, mesh: ParallelMesh, device: torch.device) -> None:
    """Let a Trainer's callback handler share what callbacks have decided on any rank with all."""

    def call_event(
        self: Any, event: str, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> Any:
        control = kind.call_event(self, event, args, state, control, **kwargs)
        if event in DECIDED_AFTER:
            share_decisions(control, mesh, device)
        return control

    kind = type(handler)
    handler.__class__ = type(kind.__name__, (kind,), {"call_event": call_event})


class SharedDecisions:
    """A Trainer whose ranks stop, save, evaluate and log together."""

    mesh: ParallelMesh

    # Of the trainer that follows in the order of classes.
    args: Any
    control: Any

    def set_initial_training_values(self, args: Any, dataloader: Any, *others: Any) -> Any:
        """How long to train: refuses loaders whose lengths differ between ranks."""
        check_length(dataloader, self.mesh)
        return super().set_initial_training_values(args, dataloader, *others)  # type: ignore[misc]

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """With the metrics of the first rank, which may choose the best step, or stop training."""
        check_length(dataloader, self.mesh)
        found = super().evaluation_loop(dataloader, *args, **kwargs)  # type: ignore[misc]
        box = [found.metrics]
        if self.mesh.degrees.world > 1:
            dist.broadcast_object_list(box, src=0)
        return found._replace(metrics=box[0])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)  # type: ignore[misc]
        if start_time is not None:  # a step's, which all ranks log
            share_decisions(self.control, self.mesh, self.args.device)


def share_decisions(control: Any, mesh: ParallelMesh, device: torch.device) -> None:
    """Make a decision of any rank one of all ranks, which call this together.

    Traffic per rank: five numbers, for which the host waits, as a Trainer does to see a NaN.
    """
    if mesh.degrees.world == 1:
        return
    decided = torch.tensor([int(getattr(control, name)) for name in DECISIONS], device=device)
    dist.all_reduce(decided, dist.ReduceOp.MAX)
    for name, value in zip(DECISIONS, decided.tolist(), strict=True):
        setattr(control, name, bool(value))


def check_length(loader: Any, mesh: ParallelMesh) -> None:
    """Refuse a loader that would end on some ranks while others wait for them in the next batch.

    Raises:
        ValueError: on all ranks.
    """
    try:
        rows, batches = len(loader.dataset), len(loader)
    except (AttributeError, TypeError, NotImplementedError):  # a stream, or a loader of one's own
        rows = batches = -1
    lengths = [(rows, batches)] * mesh.degrees.world
    if mesh.degrees.world > 1:
        dist.all_gather_object(lengths, (rows, batches))
    for rank, (its_rows, its_batches) in enumerate(lengths):
        if (its_rows, its_batches) != lengths[0]:
            raise ValueError(
                f"Ranks of a mesh are given the same data set, of which each takes its rows, got "
                f"{its_rows} rows in {its_batches} batches on rank {rank} and {lengths[0][0]} in "
                f"{lengths[0][1]} on rank 0: give all of them all rows, and the same arguments."
            )
