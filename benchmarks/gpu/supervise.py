"""Run each stage in processes of its own, so that no case takes the results of others with it.

An error of CUDA ends the process that met it, a kernel may hang or crash: the case that was running
gets a line that says so, and a new process goes on with the next. A stage has its time, a case its
own; a stage that cannot even start is passed over. A case that its end cuts short gets a line where
it started in the first half; one that started later is left for another run.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.processes import run_watched
from benchmarks.gpu.run import (
    POISONED,
    append,
    forget_taken,
    is_wrong,
    read_lines,
    running_case,
    running_file,
)

CASE_SECONDS = 90.0
"""The longest case: kernels of several kinds compile for seconds each, ranks import torch anew."""
START_SECONDS = 60.0
"""Until a process names its first case."""
GRACE = 10.0
"""For the last case of a stage, which may start just before its time is over."""
OVER = "the time of its stage was over"
UNENDED = "did not end within its stage"


def supervise(
    stage: str,
    seconds: float,
    folder: Path,
    *,
    workers: int = 1,
    command: list[str] | None = None,
) -> int:
    """Run a stage to its end or its time; how many of its new lines are wrong.

    Args:
        workers: processes that share the cases.
        command: that runs the stage, for a test.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, before = folder / f"{stage}.jsonl", len(read_lines(folder / f"{stage}.jsonl"))
    forget_taken(folder, stage)
    own = [sys.executable, "-m", "benchmarks.gpu", "--child", stage]
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(workers) as pool:
        runs = [
            pool.submit(_run_worker, stage, worker, end - seconds / 2, end, folder, command or own)
            for worker in range(workers)
        ]
    for run in runs:
        run.result()
    forget_taken(folder, stage)
    return sum(map(is_wrong, read_lines(path)[before:]))


def _run_worker(
    stage: str, worker: int, middle: float, end: float, folder: Path, command: list[str]
) -> None:
    """Run a process to the end of the cases, and another where one ended at a case."""
    path = folder / f"{stage}.jsonl"
    while time.monotonic() < end:
        left = end - time.monotonic()
        options = ["--seconds", f"{left:.1f}", "--results", str(folder), "--worker", str(worker)]
        watch = _Watch(folder, stage, worker, middle, end)
        ended = run_watched([*command, *options], watch=watch)
        case = running_case(folder, stage, worker)
        if ended.status == 0:
            break
        if ended.status == POISONED and case is None:
            continue
        running_file(folder, stage, worker).unlink(missing_ok=True)
        if ended.killed_for == OVER:
            # Not wrong for that: another run measures it.
            print(f"  {stage}: {OVER} in the middle of {case or 'its start'}", flush=True)
            break
        why = ended.killed_for or f"the process ended with status {ended.status}"
        append(path, {"stage": stage, "case": case or "start", "failed": why})
        print(f"  WRONG {stage}, {case or 'start'}: {why}", flush=True)
        if case is None:
            break


class _Watch:
    """Why a stage's process must end: a case or the start took too long, or the stage did."""

    def __init__(self, folder: Path, stage: str, worker: int, middle: float, end: float) -> None:
        self.folder, self.stage, self.worker = folder, stage, worker
        self.middle, self.end = middle, end
        self.case: str | None = None
        self.since = time.monotonic()

    def __call__(self) -> str:
        case, now = running_case(self.folder, self.stage, self.worker), time.monotonic()
        if case != self.case:
            self.case, self.since = case, now
        limit = START_SECONDS if case is None else CASE_SECONDS
        if now - self.since > limit:
            return f"took longer than {limit:.0f} s"
        if now <= self.end + GRACE:
            return ""
        return OVER if case is None or self.since > self.middle else UNENDED
