"""Run the cases of a stage within its time, and keep a line of JSON for each."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.problems import Case
from benchmarks.gpu.stages import Stage
from benchmarks.report import table

POISONED = 75
"""Exit status of a process whose GPU an error has made useless to it."""


def run_stage(
    stage: Stage,
    folder: Path,
    *,
    again: bool,
    device: str = "cuda",
    seconds: float | None = None,
    worker: int | None = None,
) -> int:
    """Measure what has no line yet, until the time is over; how many cases were wrong or failed.

    Args:
        seconds: in the place of the stage's own.
        worker: which of several processes this is, each of which takes what no other has; None for
            the only one.
    Raises:
        SystemExit: an error of CUDA, after its case has a line; a new process can go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, limit = folder / f"{stage.name}.jsonl", stage.seconds if seconds is None else seconds
    if again:
        path.unlink(missing_ok=True)
    done = {line["case"] for line in read_lines(path)}
    cases = [case for case in stage.cases(device) if case.name not in done]
    start, wrong, parent = time.monotonic(), 0, os.getppid()
    if device == "cuda":
        # A case may first ask for the memory that it will take.
        torch.cuda.init()
    if not worker:
        print(f"{stage.name}: {stage.question} {len(cases)} cases", flush=True)
    running = running_file(folder, stage.name, worker or 0)
    for index, case in enumerate(cases):
        if time.monotonic() - start > limit:
            print(f"  {stage.name}: time is over, {len(cases) - index} cases left for another run")
            break
        if os.getppid() != parent:
            print(f"  {stage.name}: ended with the campaign, which was killed")
            break
        if worker is not None and not _is_first_at(case, stage, folder):
            continue
        running.write_text(case.name)
        line = _line(stage, case)
        append(path, line)
        running.unlink()
        wrong += is_wrong(line)
        if is_wrong(line):
            print(f"  WRONG {json.dumps(line)[:600]}", flush=True)
        if device == "cuda" and not _is_usable():
            raise SystemExit(POISONED)
    return wrong


def _is_first_at(case: Case, stage: Stage, folder: Path) -> bool:
    """Whether no other process of this run has taken the case; takes it."""
    try:
        _taken(folder, stage.name, case.name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _taken(folder: Path, stage: str, case: str) -> Path:
    return folder / f"{stage}.{hashlib.md5(case.encode()).hexdigest()[:12]}.taken"


def forget_taken(folder: Path, stage: str) -> None:
    """Let the cases of a stage be taken again."""
    for pattern in ("taken", "running"):
        for path in folder.glob(f"{stage}.*.{pattern}"):
            path.unlink(missing_ok=True)


def _line(stage: Stage, case: Case) -> dict[str, Any]:
    start = time.monotonic()
    try:
        result = case.run()
    # A case that raises is a finding, whatever the class, and compilers of kernels have classes
    # of their own: its line says "failed" with the error, counts as wrong, is named in the verdict
    # and makes the exit status 1. The next cases are still measured. Ctrl-C ends it.
    except Exception as error:  # noqa: BLE001
        result = {"failed": f"{type(error).__name__}: {error}"[:500]}
    return {
        "stage": stage.name,
        "case": case.name,
        **result,
        "seconds": round(time.monotonic() - start, 3),
        **conditions(),
    }


def conditions() -> dict[str, str]:
    """What a figure holds for."""
    gpu = torch.cuda.is_available()
    return {
        "card": torch.cuda.get_device_name() if gpu else "no GPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _is_usable() -> bool:
    """Whether the GPU still answers this process: after some errors it never does again."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line, on the disk before anything else happens."""
    with path.open("ab+") as file:
        # Not to one that a process was killed at: both would be lost.
        size = file.seek(0, os.SEEK_END)
        whole = size == 0 or os.pread(file.fileno(), 1, size - 1) == b"\n"
        file.write((b"" if whole else b"\n") + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def is_wrong(line: dict[str, Any]) -> bool:
    return "failed" in line or line.get("right") is False


def running_file(folder: Path, stage: str, worker: int) -> Path:
    """Where a stage's process writes the case it is at."""
    return folder / f"{stage}.{worker}.running"


def running_case(folder: Path, stage: str, worker: int) -> str | None:
    """The case that a stage's process is at, or was when it ended."""
    try:
        return running_file(folder, stage, worker).read_text() or None
    except OSError:
        return None


def forget_wrong(folder: Path, stages: list[str]) -> None:
    """Drop the lines of cases that were wrong or failed, so that they are measured again."""
    for name in stages:
        path = folder / f"{name}.jsonl"
        kept = [line for line in read_lines(path) if not is_wrong(line)]
        if path.exists():
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a stage; none where it has not run. A line cut short is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def summary(folder: Path) -> str:
    """A table per stage of what was measured."""
    texts = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = [line for line in read_lines(path) if "refused" not in line]
        names = list(dict.fromkeys(key for line in lines for key in line if key not in HIDDEN))
        rows = [[_cell(line.get(name)) for name in names] for line in lines]
        if rows:
            texts.append(f"{path.stem}\n\n{table(names, rows)}")
    return "\n\n".join(texts) or "nothing was measured yet"


def verdict(folder: Path, stages: Sequence[str] = ()) -> str:
    """How many lines each stage has, and what is wrong: to be read where the tables are cut off.

    Args:
        stages: named also where they have none.
    """
    texts = []
    for name in dict.fromkeys([*stages, *(path.stem for path in sorted(folder.glob("*.jsonl")))]):
        lines = read_lines(folder / f"{name}.jsonl")
        wrong = [line["case"] for line in lines if is_wrong(line)]
        text = f"{name}: {len(lines)} lines, {len(wrong)} wrong"
        texts.append(f"{text}: {'; '.join(wrong)}" if wrong else text)
    return "\n".join(texts)


HIDDEN = ("stage", "seconds", "card", "torch", "python")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value}"
