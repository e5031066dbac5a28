"""Launches of a few ranks that do next to nothing, one after another, for test_survive_processes.

    python -m tests.harness.launched_cases BEAT FOLDER CASE ...

Prints "case NAME", what the ranks say, and "exit CODE" for each.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

from dtcp.pretrain import attempt
from dtcp.pretrain import launch as launcher
from dtcp.pretrain.report import FailureReport
from dtcp.pretrain.stop import StopRequest

RANKS = 3
FOREVER = 600
"""Seconds after which a case has failed."""


def folder() -> Path:
    return Path(sys.argv[2])


def meet(*, timeout: float = 60.0) -> FailureReport:
    """Be a rank of a group; returns what reports its failures."""
    report = FailureReport(folder())
    report.attempt = attempt.Attempt(seconds=60.0)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    dist.all_reduce(torch.ones(1))
    return report


def listening() -> int:
    """Rank 0 lists what the launcher and all ranks listen on."""
    meet()
    if launcher.rank() == 0:
        for line in sockets_of_the_family():
            print("listens", line, flush=True)
    dist.barrier()
    return 0


def sockets_of_the_family() -> Iterator[str]:
    """Table and address of each socket that the launcher or a rank has open to others."""
    parent = os.getppid()
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    inodes = set()
    for pid in [str(parent), *children]:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(file))
            except FileNotFoundError:
                continue
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            is_open = table.startswith("udp") or fields[3] == "0A"  # the state LISTEN
            if is_open and f"socket:[{fields[9]}]" in inodes:
                yield f"{table} {fields[1].partition(':')[0]}"


def restarted() -> int:
    """Rank 1 is killed in the first attempt, with everybody in the group."""
    first = not (folder() / "restarted").exists()
    # Who only lost a peer waits for signs of life before it fails, and is killed meanwhile.
    with meet():
        if launcher.rank() == 1 and first:
            (folder() / "restarted").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
        print("rank", launcher.rank(), "went on:", not first, flush=True)
    return 0


def two_causes() -> int:
    """Rank 1 fails twice in the same words; the others wait for it."""
    with meet():
        if launcher.rank() == 1:
            raise ValueError("x is y, got x=1: set it to 2.")
        dist.barrier()
    return 0


def refused() -> int:
    refusal = "a folder has one run, got two" if launcher.rank() == 0 else ""
    with FailureReport(folder()):
        attempt.Attempt(seconds=60.0, refusal=refusal)
    return 0


def refused_at_the_start() -> int:
    """Rank 1 refuses before the first step, and a new start would not help."""
    report = meet()
    report.is_starting = True
    with report:
        if launcher.rank() == 1:
            raise ValueError("x is y, got x=1: set it to 2.")
        dist.barrier()
    return 0


def absent() -> int:
    if launcher.rank() == 1:
        time.sleep(FOREVER)
    with FailureReport(folder()):
        attempt.Attempt(seconds=1.0)
    return 0


def frozen() -> int:
    with meet(timeout=2.0):
        if launcher.rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))
    return 0


def alive() -> int:
    """Rank 1 lives, and does not come to the collective."""
    with meet(timeout=1.0):
        if launcher.rank() == 1:
            time.sleep(FOREVER)
        dist.all_reduce(torch.ones(1))
    return 0


def stopped_early() -> int:
    """All are to stop when rank 0 alone listens."""
    with meet():
        if launcher.rank() == 0:
            stop = StopRequest(timedelta(seconds=60))
            dist.barrier()
            os.kill(os.getppid(), signal.SIGTERM)
            with stop.asked_of_all():
                dist.barrier()
        dist.barrier()
        time.sleep(FOREVER)
    return 0


def slow_to_stop() -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    meet()
    if launcher.rank() == 1:
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(FOREVER)
    return 0


CASES = {
    work.__name__: (work, policy)
    for work, policy in {
        listening: launcher.RestartPolicy(),
        restarted: launcher.RestartPolicy(max_restarts=2),
        two_causes: launcher.RestartPolicy(max_restarts=1),
        frozen: launcher.RestartPolicy(),
        refused: launcher.RestartPolicy(),
        refused_at_the_start: launcher.RestartPolicy(max_restarts=2),
        absent: launcher.RestartPolicy(),
        alive: launcher.RestartPolicy(),
        stopped_early: launcher.RestartPolicy(),
        slow_to_stop: launcher.RestartPolicy(max_restarts=3, stop_seconds=1),
    }.items()
}


def main() -> None:
    attempt.BEAT = float(sys.argv[1])
    for name in sys.argv[3:]:
        work, policy = CASES[name]
        print("case", name, flush=True)
        print("exit", launcher.launch(launcher.Ranks(RANKS, "cpu"), work, (), policy), flush=True)


if __name__ == "__main__":
    main()
