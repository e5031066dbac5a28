"""Launches of a few ranks that do next to nothing, one after another, for test_survive_processes.

    python tests/harness/launched_cases.py FOLDER CASE ...

Prints "case NAME", what the ranks say, and "exit CODE" for each, errors in their places. None of
it depends on how fast a rank is: where one waits for seconds to pass, in the library, it waits here
for what others do.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed as dist

from dtcp._torch.collectives import SET_PROCESS_GROUP_TIMEOUT
from dtcp.pretrain import attempt
from dtcp.pretrain import launch as launcher
from dtcp.pretrain import report as reports
from dtcp.pretrain.report import FailureReport
from dtcp.pretrain.stop import StopRequest

RANKS = 3
FOREVER = 600.0
"""Seconds after which a case has failed."""


def folder() -> Path:
    return Path(sys.argv[1])


def meet() -> FailureReport:
    """Be a rank of a group; returns what reports its failures.

    Who only lost a peer is killed while it waits for signs of life, however slow the launcher is.
    """
    attempt.BEAT = FOREVER
    return meet_with_beats()


def meet_with_beats() -> FailureReport:
    report = FailureReport(folder())
    report.attempt = attempt.Attempt(seconds=FOREVER)
    dist.init_process_group("gloo", timeout=timedelta(seconds=FOREVER))
    dist.all_reduce(torch.ones(1))
    return report


def meet_to_lose_each_other(*beating: int) -> FailureReport:
    """Be a rank of a group that waits a second for others, and knows who is alive.

    Args:
        beating: ranks that live: who looks for signs of life waits until these gave two.
    """
    attempt.BEAT = 0.1
    report = meet_with_beats()
    assert report.attempt is not None
    attempt.time = SimpleNamespace(sleep=lambda seconds: wait_for_beats(report.attempt, beating))
    SET_PROCESS_GROUP_TIMEOUT(timedelta(seconds=1))
    return report


def wait_for_beats(met: attempt.Attempt, ranks: Sequence[int]) -> None:
    store = attempt.attempt_store()
    before = met._beats(store)
    while any(met._beats(store)[rank] < before[rank] + 2 for rank in ranks):
        time.sleep(0.01)


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
    """All have the same to say, and who says it takes its time."""

    def slowly(line: str, **options: Any) -> None:
        time.sleep(0.5)
        print(line, **options)

    reports.print = slowly
    refusal = "a folder has one run, got two" if launcher.rank() == 0 else ""
    with FailureReport(folder()):
        attempt.Attempt(seconds=FOREVER, refusal=refusal)
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
    """Rank 1 does not come, and the time of rank 0 is over when rank 2 has come."""
    if launcher.rank() == 1:
        time.sleep(FOREVER)
    if launcher.rank() == 0:
        attempt.time = SimpleNamespace(
            sleep=time.sleep, monotonic=lambda: 2 * FOREVER * has_come(2)
        )
    with FailureReport(folder()):
        attempt.Attempt(seconds=FOREVER)
    return 0


def ended_early() -> int:
    """Rank 1 is refused before it meets the others, whose launcher does not hear of it."""
    try:
        with FailureReport(folder()):
            if launcher.rank() == 1:
                raise ValueError("x is y, got x=1: set it to 2.")
            attempt.Attempt(seconds=FOREVER)
    except SystemExit:
        if launcher.rank() == 1:
            time.sleep(FOREVER)
        raise
    return 0


def has_come(rank: int) -> bool:
    """Whether a rank has found itself among those that rank 0 saw."""
    host, port = attempt.agent_address()
    store = dist.PrefixStore("dtcp/meeting", dist.TCPStore(host, port, is_master=False))
    room = json.loads(store.get("room")) if store.check(["room"]) else {"name": ""}
    return store.check([f"ack/{room['name']}/{rank}"])


def frozen() -> int:
    with meet_to_lose_each_other(0, 2):
        if launcher.rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))
    return 0


def alive() -> int:
    """Rank 1 lives, and does not come to the collective."""
    with meet_to_lose_each_other(0, 1, 2):
        if launcher.rank() == 1:
            time.sleep(FOREVER)
        dist.all_reduce(torch.ones(1))
    return 0


def stopped_early() -> int:
    """All are to stop when rank 0 alone listens."""
    with meet():
        if launcher.rank() == 0:
            stop = StopRequest(timedelta(seconds=FOREVER))
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
        ended_early: launcher.RestartPolicy(),
        alive: launcher.RestartPolicy(),
        stopped_early: launcher.RestartPolicy(),
        slow_to_stop: launcher.RestartPolicy(max_restarts=3, stop_seconds=1),
    }.items()
}


def main() -> None:
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
    for chosen_by_the_launcher in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"):
        os.environ.pop(chosen_by_the_launcher, None)
    for name in sys.argv[2:]:
        work, policy = CASES[name]
        print("case", name, flush=True)
        print("exit", launcher.launch(launcher.Ranks(RANKS, "cpu"), work, (), policy), flush=True)


if __name__ == "__main__":
    main()
