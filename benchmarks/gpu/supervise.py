"""Run each stage in a process of its own, so that no case takes the results of others with it.

An error of CUDA ends the process that met it, a kernel may hang or crash: the case that was running
gets a line that says so, and a new process goes on with the next. A stage has its time, a case its
own; a stage that cannot even start is passed over.
"""

import sys
import time
from pathlib import Path

from benchmarks.gpu.processes import run_watched
from benchmarks.gpu.run import POISONED, append, is_wrong, read_lines, running_case

CASE_SECONDS = 75.0
"""The longest case: a kernel of CuTe compiles for many seconds, ranks import torch anew."""
START_SECONDS = 60.0
"""Until a process names its first case."""
GRACE = 15.0
"""For the last case of a stage, which may start just before its time is over."""


def supervise(stage: str, seconds: float, folder: Path, *, command: list[str] | None = None) -> int:
    """Run a stage to its end or its time; how many of its new lines are wrong.

    Args:
        command: that runs the stage, for a test.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, before = folder / f"{stage}.jsonl", len(read_lines(folder / f"{stage}.jsonl"))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        left = end - time.monotonic()
        own = [sys.executable, "-m", "benchmarks.gpu", "--child", stage]
        full = [*(command or own), "--seconds", f"{left:.1f}", "--results", str(folder)]
        ended = run_watched(full, watch=_Watch(folder, stage, end + GRACE))
        case = running_case(folder, stage)
        if ended.status == 0:
            break
        if ended.status == POISONED and case is None:
            continue
        why = ended.killed_for or f"the process ended with status {ended.status}"
        append(path, {"stage": stage, "case": case or "start", "failed": why})
        (folder / f"{stage}.running").unlink(missing_ok=True)
        print(f"  WRONG {stage}, {case or 'start'}: {why}", flush=True)
        if case is None:
            break
    return sum(map(is_wrong, read_lines(path)[before:]))


class _Watch:
    """Why a stage's process must end: a case or the start took too long, or the stage did."""

    def __init__(self, folder: Path, stage: str, end: float) -> None:
        self.folder, self.stage, self.end = folder, stage, end
        self.case: str | None = None
        self.since = time.monotonic()

    def __call__(self) -> str:
        case, now = running_case(self.folder, self.stage), time.monotonic()
        if case != self.case:
            self.case, self.since = case, now
        limit = START_SECONDS if case is None else CASE_SECONDS
        if now - self.since > limit:
            return f"took longer than {limit:.0f} s"
        return "the time of its stage was over" if now > self.end else ""
