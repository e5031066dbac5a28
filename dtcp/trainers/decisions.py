"""What one rank decides by itself, in a callback or by its metrics, holds on all ranks.

A callback may look at the clock or at a file, or hear a signal that only its host received. A rank
that then stops, saves or evaluates alone leaves the others waiting for it.
"""

import inspect
from collections.abc import Callable, Mapping
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
    log: Callable[..., None]

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

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Of trials that no rank ends by itself."""
        search = super().hyperparameter_search  # type: ignore[misc]
        given = inspect.signature(search).bind(*args, **kwargs)
        check_search({**given.arguments, **given.arguments.get("kwargs", {})}, self.mesh)
        return search(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Which reads, once a step is logged, whether to evaluate: as all ranks decided there.

        However `log` is overridden; what one rank logs at other times waits for nobody.
        """
        log, own = self.log, vars(self)

        def log_step(*args: Any, **kwargs: Any) -> None:
            del own["log"]
            log(*args, **kwargs)
            share_decisions(self.control, self.mesh, self.args.device)

        if self.control.should_log:
            own["log"] = log_step
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        finally:
            own.pop("log", None)


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


def check_search(given: Mapping[str, Any], mesh: ParallelMesh) -> None:
    """Refuse a search for hyperparameters that ends trials on the rank that asks for them.

    Raises:
        ValueError: naming the argument.
    """
    backend = given.get("backend")
    if mesh.degrees.world == 1:
        return
    for name, value, remedy in (
        ("backend", getattr(backend, "value", backend) or "optuna", "take optuna"),
        ("pruner", type(given.get("pruner")).__name__, "pass optuna.pruners.NopPruner()"),
        ("timeout", given.get("timeout"), "leave it out, and give n_trials"),
        ("n_jobs", given.get("n_jobs", 1), "leave it out: all ranks work on one trial"),
        ("catch", given.get("catch", ()), "leave it out"),
    ):
        if value not in ("optuna", "NopPruner", None, 1, ()):
            raise ValueError(
                f"Trials of a search on a mesh run to their end on all ranks, got {name}={value}, "
                f"by which the first rank alone would end one: {remedy}."
            )


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
