"""Whether a whole checkpoint belongs to this run: its model, and its data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dtcp.checkpoint import SafeReader

STATES = ("optimizer", "lr_scheduler", "dataloader", "train_state")
"""What a checkpoint holds beside the model, by torchtitan's names."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A data loader that recognizes its data: its state has what it compares when it loads."""

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data, as JSON: kept in the manifest of every checkpoint."""


def refuse_other_model(reader: SafeReader, known: Mapping[str, torch.Size], path: Path) -> None:
    """Refuse weights of more, fewer or other tensors: DCP would ignore those it does not look for.

    Args:
        known: shapes of the model's state dict, of all stages of it.
    Raises:
        ValueError: naming the first tensor that does not fit.
    """
    saved = reader.read_metadata().state_dict_metadata
    beside = tuple(f"{name}." for name in STATES)
    extra = [n for n in saved if not n.startswith(beside) and n not in known]
    missing = [n for n in known if n not in saved]
    other = [n for n, x in known.items() if n in saved and _size(saved[n]) != x]
    for names, what in (
        (extra, "that the model lacks"),
        (missing, "that only the model has"),
        (other, "of another shape"),
    ):
        if names:
            raise ValueError(
                f"A checkpoint holds the weights of this model, got {path} with {names[0]} "
                f"and {len(names) - 1} more {what}: it is of another model; choose another "
                f"--dump_folder, or the config it was made with."
            )


def _size(value: Any) -> Any:
    return value.size if isinstance(value, TensorStorageMetadata) else None
