"""What a Trainer keeps of a run on a mesh, readable on any other: weights as transformers writes
them, and the optimizer's state by the names of its parameters."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from dtcp.checkpoint import SafeLoadPlanner, SafeReader
from dtcp.parallelize.load_hf import fill_hf

OPTIMIZER = "optimizer"
"""The folder of torch's distributed checkpoint in that of a step."""


def gathered_weights(model: Any) -> dict[str, Tensor]:
    """Every weight, whole, by the names and in the shapes of the unsharded model; on rank 0.

    All ranks call it together; the others get nothing.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: dict[str, Any] = get_model_state_dict(model, options=options)
    with torch.device("meta"):
        # Of a copy: to build a model is to note its implementation of attention in its config.
        plain = type(model)._from_config(deepcopy(model.config), attn_implementation="eager")
    shapes = {name: x.shape for name, x in plain.named_parameters()}
    shapes |= {name: x.shape for name, x in plain.state_dict().items() if name not in _tied(plain)}
    return {name: x.reshape(shapes[name]) for name, x in whole.items() if name in shapes}


def _tied(model: nn.Module) -> set[str]:
    """Names of parameters that have another name, too, but for the first."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def save_weights(model: Any, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write weights and config as transformers does, on rank 0; all ranks call it together.

    Args:
        dtype: of floating-point weights; None leaves them as they are.
    """
    whole = gathered_weights(model)
    if whole:
        cast = {k: x.to(dtype) if dtype and x.is_floating_point() else x for k, x in whole.items()}
        model.save_pretrained(folder, state_dict=cast)


def load_weights(model: Any, folder: Path) -> None:
    """Fill a model with the weights that a Trainer has saved, each rank its shards.

    Raises:
        ValueError: a folder without weights, or with those of another model.
    """
    fill_hf(model, folder)


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


def _own(optimizer: Any) -> Any:
    """torch's optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
