"""What a Trainer keeps of a run on a mesh, readable on any other: weights as transformers writes
them, and the optimizer's state by the names of its parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from dtcp.checkpoint import SafeLoadPlanner, SafeReader
from dtcp.parallelize.load_hf import fill_adapters, fill_hf
from dtcp.parallelize.plans.adapters import adapted_model
from dtcp.parallelize.save_hf import save_hf

OPTIMIZER = "optimizer"
"""The folder of torch's distributed checkpoint in that of a step."""


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
    """Write each rank's part of the optimizer's state."""
    state = get_optimizer_state_dict(model, _own(optimizer))
    dcp.save({OPTIMIZER: state}, checkpoint_id=folder / OPTIMIZER)


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
def random_states_of_batch_ranks(trainer: Any) -> Iterator[None]:
    """Let a Trainer name files of random states by batch ranks, as any mesh and one rank have them.

    transformers names them by processes, and in another way where there is one; rows are shuffled,
    and completions drawn, by numbers that all ranks of a cp and tp group share.
    """
    own, index = trainer.args, trainer.mesh.rank("batch")
    trainer.args = SimpleNamespace(world_size=2, process_index=index, parallel_mode=None)
    try:
        yield
    finally:
        trainer.args = own


def _own(optimizer: Any) -> Any:
    """torch's optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
