"""What manifest, checksums and a careful reader cost beside torch's checkpoints alone.

    python -m benchmarks.checkpoint
    python -m benchmarks.checkpoint --gigabytes 1 --repeats 7 --write cpu

One process saves and loads weights and two moments of AdamW, in turn with torch's own writer and
reader and with ours, into a folder on the disk (written through, with fsync) and into one in
memory, where nothing hides what the processor does. Files on the disk are dropped from the page
cache before they are loaded, as after a restart of the machine; those in memory are the worst case.
Seconds of the clock are what a run waits; seconds of the processor, user and system, depend less on
who else uses the machine. What was loaded is compared with what was saved before anything is said.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dtcp.torchtitan import compat as compat

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp

from benchmarks.report import conditions, publish, table
from dtcp.checkpoint import SafeLoadPlanner, SafeReader
from dtcp.pretrain.checkpoint_choice import choose
from dtcp.pretrain.checkpoint_writer import CheckpointWriter
from dtcp.pretrain.finite import not_finite
from dtcp.pretrain.manifest import Manifest
from dtcp.pretrain.saved_folders import SavedFolders

LAYERS = 32
HEAD = ("", "torch, s", "ours, s", "ours / torch, pairs", "torch, CPU s", "ours, CPU s", "of which")
State = Mapping[str, Tensor]


def main() -> None:
    """Measure in both folders and print the table."""
    args = _arguments()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    torch.set_num_threads(1)
    state = _state(int(args.gigabytes * 1e9))
    rows = []
    for name, parent in (("disk", args.disk), ("memory", args.memory)):
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            rows += _measure(name, state, Path(folder), args.repeats)
    options = {"gigabytes": args.gigabytes, "repeats": args.repeats}
    text = f"{conditions('benchmarks.checkpoint', options)}\n"
    load = f"load of the machine {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
    text += f"{len(state)} tensors, medians (and the least); {load}\n"
    text += f"disk is {args.disk}, memory is {args.memory}\n\n"
    text += f"{table(HEAD, rows)}\n"
    publish("checkpoint", args.write, text)


def _measure(name: str, state: State, folder: Path, repeats: int) -> list[tuple[str, ...]]:
    folders = SavedFolders(folder / "ours")
    plain = folder / "plain/step-1"
    saves = _in_turn(partial(_save_plain, state, plain), partial(_save, state, folders), repeats)
    look, total = _took(partial(not_finite, state)), sum(x.nbytes for x in state.values())
    loaded = {key: torch.empty_like(x) for key, x in state.items()}
    loads = _in_turn(
        partial(_load_plain, loaded, plain),
        partial(_load, loaded, folders),
        repeats,
        before=partial(_drop_cached, folder),
    )
    if not all(torch.equal(loaded[key], x) for key, x in state.items()):
        raise SystemExit("What was loaded is not what was saved.")
    verify = _took(partial(choose, folders, -1, checksums=True))
    size = f"{total / 1e9:.2f} GB"
    return [
        _row(f"save {size}, {name}", *saves, f"look for NaN {look.processor:.3f}"),
        _row(f"load {size}, {name}", *loads, f"checksums {verify.processor:.3f}"),
    ]


@dataclass(frozen=True)
class Took:
    """Seconds by the clock, and of the processor."""

    clock: float
    processor: float


def _row(name: str, torchs: list[Took], ours: list[Took], part: str) -> tuple[str, ...]:
    ratios = [mine.clock / theirs.clock for mine, theirs in zip(ours, torchs, strict=True)]
    clocks = [_median_and_least([x.clock for x in took]) for took in (torchs, ours)]
    processor = [_median_and_least([x.processor for x in took]) for took in (torchs, ours)]
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return name, *clocks, spread, *processor, part


def _median_and_least(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f})"


def _in_turn(
    first: Callable[[], object],
    second: Callable[[], object],
    repeats: int,
    *,
    before: Callable[[], object] = lambda: None,
) -> tuple[list[Took], list[Took]]:
    """What both took, measured in turn, after one warm-up each; who goes first alternates.

    Args:
        before: done before each, and not measured.
    """
    times: tuple[list[Took], list[Took]] = ([], [])
    for work in (first, second):
        work()
    for number in range(repeats):
        for which in ((0, 1), (1, 0))[number % 2]:
            before()
            times[which].append(_took((first, second)[which]))
    return times


def _took(work: Callable[[], object]) -> Took:
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return Took(time.perf_counter() - clock, time.process_time() - processor)


def _drop_cached(folder: Path) -> None:
    """Let the system forget the files' content, where it is on a disk and written through."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _save_plain(state: State, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    dcp.save(dict(state), checkpoint_id=folder)


def _save(state: State, folders: SavedFolders) -> None:
    """With the look for NaN that comes before every save."""
    shutil.rmtree(folders.path(1), ignore_errors=True)
    if not_finite(state):
        raise SystemExit("The state is not finite.")
    manifest = Manifest(step=1, run=uuid.uuid4().hex, save=uuid.uuid4().hex, holds="state")
    writer = CheckpointWriter(folders, "step-1", manifest=manifest)
    dcp.save(dict(state), storage_writer=writer)


def _load_plain(state: State, folder: Path) -> None:
    dcp.load(dict(state), checkpoint_id=folder)


def _load(state: State, folders: SavedFolders) -> None:
    choice = choose(folders, -1, checksums=True)
    if choice is None:
        raise SystemExit("There is no checkpoint.")
    reader = SafeReader(folders.path(choice.manifest.step))
    dcp.load(dict(state), storage_reader=reader, planner=SafeLoadPlanner())


def _state(size: int) -> dict[str, Tensor]:
    """Weights and two moments of a model of equal layers, in float32."""
    torch.manual_seed(0)
    elements = size // (4 * 3 * LAYERS)
    return {
        f"{part}.layers.{layer}": torch.randn(elements // 1024, 1024)
        for layer in range(LAYERS)
        for part in ("weight", "exp_avg", "exp_avg_sq")
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--disk", default="/var/tmp", help="a folder on a disk")
    parser.add_argument("--memory", default="/dev/shm", help="a folder in memory")
    parser.add_argument("--write", default="", help="keep the table as results/checkpoint_NAME_*")
    return parser.parse_args()


if __name__ == "__main__":
    main()
