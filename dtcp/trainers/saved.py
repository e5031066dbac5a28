"""What a Trainer keeps of a run on a mesh, readable on any other: weights as transformers writes
them, and the optimizer's state by the names of its parameters."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from dtcp.checkpoint import SafeLoadPlanner, SafeReader
from dtcp.distributed.groups import rank_of_process
from dtcp.distributed.mesh import ParallelMesh
from dtcp.parallelize.load_hf import fill_adapters, fill_hf
from dtcp.parallelize.plans.adapters import adapted_model
from dtcp.parallelize.save_hf import save_hf
from dtcp.trainers.rewards import is_first_rank

OPTIMIZER = "optimizer"
"""The folder of torch's distributed checkpoint, inside that of a step."""
RANDOM_STATES = "random_states"
"""The folder of batch ranks' random states, inside that of a step, whose own are by process."""
SCHEDULER, ARGUMENTS, STATE = "scheduler.pt", "training_args.bin", "trainer_state.json"
"""As transformers names them."""


class SharedFiles:
    """A Trainer whose ranks write and read its files together, the same on any mesh."""

    mesh: ParallelMesh

    # Of the trainer that follows in the order of classes.
    model: Any
    args: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any
    data_collator: Any
    processing_class: Any
    _get_output_dir: Callable[[Any], str]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        save_weights(self.model, folder)
        if self.args.should_save:
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            torch.save(self.args, folder / ARGUMENTS)
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: Any, trial: Any, *others: Any) -> None:
        """Whose state says last that all is there: that of an earlier run is not to say so."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / STATE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial, *others)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizer(self.model, self.optimizer, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _save_rng_state(self, output_dir: str) -> None:
        if is_first_rank(self.mesh):
            with as_batch_rank(self):
                super()._save_rng_state(str(Path(output_dir) / RANDOM_STATES))  # type: ignore[misc]
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.args.process_index == 0:
            check_random_states(Path(checkpoint))
        with as_batch_rank(self):
            super()._load_rng_state(str(Path(checkpoint) / RANDOM_STATES))  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_weights(self.model, Path(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        load_optimizer(self.model, self.optimizer, folder)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))


def save_weights(model: Any, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write weights and config as transformers does, or adapters as peft does; all ranks call it.

    Args:
        dtype: of floating-point weights; None leaves them as they are.
    """
    save_hf(model, folder, dtype=dtype)


def load_weights(model: Any, folder: Path) -> None:
    """Fill a model, or its adapters, with what save_weights wrote, each rank its shards.

    Raises:
        ValueError: a folder without weights, or with those of another model.
    """
    base = adapted_model(model)
    if base is model:
        fill_hf(model, folder)
        return
    fill_adapters(model, folder)


def save_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Write each rank's part of the optimizer's state.

    Raises:
        ValueError: hosts have written into folders of their own, none of which has all parts. On
            every rank.
    """
    state = get_optimizer_state_dict(model, _own(optimizer))
    written = dcp.save({OPTIMIZER: state}, checkpoint_id=folder / OPTIMIZER)
    missing = [""]
    if rank_of_process() == 0:
        files = {each.relative_path for each in (written.storage_data or {}).values()}
        missing = sorted(x for x in files if not (folder / OPTIMIZER / x).is_file())[:1] or [""]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(missing, src=0)
    if missing[0]:
        raise ValueError(
            f"Ranks save the optimizer's state into one folder, which all hosts share, got "
            f"{folder / OPTIMIZER} without {missing[0]}, which another host has written elsewhere: "
            f"give an output_dir on a file system that all hosts mount."
        )


def load_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Read the optimizer's state that a Trainer has saved, on whatever mesh.

    Raises:
        ValueError: a folder without it.
    """
    if not (folder / OPTIMIZER).is_dir():
        raise ValueError(
            f"A run on a mesh goes on from a checkpoint with the optimizer's state, got {folder} "
            f"without the folder {OPTIMIZER!r}: name a checkpoint of a Trainer on a mesh, saved "
            f"with save_only_model=False."
        )
    optimizer = _own(optimizer)
    state = get_optimizer_state_dict(model, optimizer)
    reader = SafeReader(folder / OPTIMIZER)
    dcp.load({OPTIMIZER: state}, storage_reader=reader, planner=SafeLoadPlanner())
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state)


@contextmanager
def as_batch_rank(trainer: Any) -> Iterator[None]:
    """Inside, a Trainer's arguments name one process per batch rank.

    transformers names files of random states, and seeds workers of loaders, by processes, and in
    another way where there is one; rows are shuffled and masked, and completions drawn, by numbers
    that all ranks of a cp and tp group share.
    """
    own = trainer.args
    trainer.args = _ArgumentsOfBatchRank(own, trainer.mesh.rank("batch"))
    try:
        yield
    finally:
        trainer.args = own


def check_random_states(folder: Path) -> None:
    """Warn of a checkpoint with random states by process only: whose they are is unknown."""
    others = sorted(file.name for file in folder.glob("rng_state*.pth"))
    if others and not (folder / RANDOM_STATES).is_dir():
        warnings.warn(
            f"A run on a mesh goes on with the random states of batch ranks, got {folder} with "
            f"{len(others)} files of processes ({others[0]}, say) and without the folder "
            f"{RANDOM_STATES!r}: they are not read, and a policy's rows, say, are shuffled anew.",
            stacklevel=2,
        )


class _ArgumentsOfBatchRank:
    """A Trainer's arguments, with the batch rank as the process."""

    world_size, parallel_mode = 2, None

    def __init__(self, own: Any, batch_rank: int) -> None:
        self._own, self.process_index = own, batch_rank

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def _own(optimizer: Any) -> Any:
    """torch's optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
