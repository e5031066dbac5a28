"""What a Trainer keeps of a run on a mesh, readable on any other: weights as transformers writes
them, and the optimizer's state by the names of its parameters."""

import warnings
from collections.abc import Iterator
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
from dtcp.parallelize.load_hf import fill_adapters, fill_hf
from dtcp.parallelize.plans.adapters import adapted_model
from dtcp.parallelize.save_hf import save_hf

OPTIMIZER = "optimizer"
"""The folder of torch's distributed checkpoint, inside that of a step."""
RANDOM_STATES = "random_states"
"""The folder of batch ranks' random states, inside that of a step, whose own are by process."""


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
