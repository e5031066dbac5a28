"""Runs that wait behind a step until a test lets them go on: no speed decides what comes first."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtcp.torchtitan import compat as compat

from torch import distributed as dist

from dtcp.pretrain.progress import Progress


class Held(Progress):
    """Each rank waits behind the line of a step as long as it is held there."""

    @dataclass(kw_only=True, slots=True)
    class Config(Progress.Config):
        pass

    def __init__(self, config: Config, *, dump_folder: str, **kwargs: Any) -> None:
        super().__init__(config, dump_folder=dump_folder, **kwargs)
        self.folder = Path(dump_folder)

    def log(self, step: int, *args: Any, **kwargs: Any) -> None:
        super().log(step, *args, **kwargs)
        while _mark(self.folder, step, dist.get_rank()).exists():
            time.sleep(0.01)


def hold(folder: Path, step: int, *ranks: int) -> None:
    """From now on, ranks of the run in this folder wait behind the line of a step."""
    for rank in ranks:
        _mark(folder, step, rank).touch()


def release(folder: Path, step: int) -> None:
    """Let all ranks go on that wait behind a step, or will come there."""
    for mark in folder.glob(f"held-{step}-*"):
        mark.unlink()


def _mark(folder: Path, step: int, rank: int) -> Path:
    return folder / f"held-{step}-{rank}"
