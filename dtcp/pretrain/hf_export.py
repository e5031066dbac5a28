"""Completes weights for transformers: what torch's writer leaves out, and the config."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from dtcp.torchtitan.model_spec import NameMapAdapter

import torch
from safetensors.torch import save_file

from dtcp.pretrain.manifest import sync_folder

INTEGERS = "model-integers.safetensors"
"""torch assembles ranks' parts of floats only (2.13)."""


def complete_export(path: Path, adapter: Any, others: dict[str, torch.Tensor]) -> None:
    """Add to the weights in a folder what makes them a model of transformers.

    Args:
        others: whole tensors by the model's own names, for the file of integers.
    """
    if others:
        _add_to_export(path, adapter.to_hf(others))
    # Each rank's part, from which torch has put the whole together.
    shutil.rmtree(path / "sharded", ignore_errors=True)
    if isinstance(adapter, NameMapAdapter):
        (path / "config.json").write_text(json.dumps(adapter.hf_config(), indent=1))


def sync_files(folder: Path) -> None:
    """Flush files that other code wrote to disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _add_to_export(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    index_path = path / "model.safetensors.index.json"
    save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, path / INTEGERS)
    index = json.loads(index_path.read_text())
    index["weight_map"] |= dict.fromkeys(tensors, INTEGERS)
    index["metadata"]["total_size"] += sum(x.nbytes for x in tensors.values())
    index_path.write_text(json.dumps(index, indent=2))
