"""One line for what torch's distributed checkpoint reports once per rank, as nested tracebacks."""

import pickle
import re
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException


def load_failure(error: CheckpointException, path: Path | str, way_back: str) -> str:
    """Why a checkpoint could not be loaded.

    Args:
        path: of the checkpoint.
        way_back: what to do instead, as half a sentence.
    """
    _, (first, _) = next(iter(error.failures.items()))
    if isinstance(first, ValueError) and str(first).startswith("A checkpoint "):
        # Of our planner, which knows the entry and not the folder.
        return f"{str(first).rstrip('.')} ({path}); {way_back}."
    if isinstance(first, pickle.UnpicklingError):
        return (
            f"A checkpoint holds data and no code, got a tensor in {path} that torch refuses "
            f"to read as data: nothing of it was run; {way_back}."
        )
    lacks = re.search(r"Missing key in checkpoint state_dict: ((\w+)\.\S+?)\.?(\s|$)", str(first))
    if lacks and lacks[2] in ("optimizer", "lr_scheduler", "dataloader"):
        return (
            f"A checkpoint has what the parts of a run keep, got {path} without {lacks[1]}: its "
            f"{lacks[2]} had other settings, or it is damaged; bring them back, or let it start "
            f"anew by --checkpoint.exclude_from_loading {lacks[2]}."
        )
    return (
        f"A checkpoint holds the whole state of this model, got {path} ({_cause(error)}): it "
        f"is damaged, or of another model; {way_back}."
    )


def save_failure(error: CheckpointException, root: Path, step: int, newest: str) -> str:
    """Why a checkpoint could not be saved in a folder.

    Args:
        step: after which it was; -1 where it was saved in the background.
        newest: which checkpoint is the last one, as a sentence.
    """
    when = f" at step={step}" if step >= 0 else " in the background"
    return (
        f"A checkpoint is written as a whole, got {_cause(error)}{when} in {root}: what was "
        f"written of it is removed. {newest}; make room or mend the folder, and start again."
    )


def _cause(error: CheckpointException) -> str:
    rank, (first, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(first).__name__}: " + re.sub(r"\s+", " ", str(first))[:300]
