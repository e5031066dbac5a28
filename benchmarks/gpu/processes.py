"""Run a command, or ranks, with an end: past it, what was started is killed, and all of it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

POLL = 0.1
ERROR = re.compile(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception|Unsupported)\b")


class Ended(NamedTuple):
    """How a command ended: its exit status, None where it was killed, and why it was."""

    status: int | None
    killed_for: str
    output: str


def run_watched(
    command: Sequence[str],
    *,
    watch: Callable[[], str],
    capture: bool = False,
    environment: dict[str, str] | None = None,
) -> Ended:
    """Run until it ends, or until `watch` says why it must.

    Args:
        watch: asked several times a second; an empty text lets it run on.
        capture: whether to return what it prints, rather than to print it.
    """
    pipe = subprocess.PIPE if capture else None
    started = subprocess.Popen(
        command,
        stdout=pipe,
        stderr=subprocess.STDOUT if capture else None,
        text=True,
        start_new_session=True,
        env=None if environment is None else {**os.environ, **environment},
    )
    while True:
        try:
            output, _ = started.communicate(timeout=POLL)
            return Ended(started.returncode, "", output or "")
        except subprocess.TimeoutExpired:
            reason = watch()
        if reason:
            _kill(started.pid)
            output, _ = started.communicate()
            return Ended(None, reason, output or "")


def run_ranks(number: int, module: str, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run ranks on this machine; what one of them printed as a line of JSON.

    Raises:
        RuntimeError: they failed, or took longer than so many seconds; says with which error.
    """
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    # A machine without a network may not know its own name.
    launch += ["--local-addr", "127.0.0.1"]
    command = [sys.executable, "-m", *launch, "-m", module, *arguments]
    loopback = {"GLOO_SOCKET_IFNAME": "lo"}
    ended = run_watched(command, watch=no_later_than(seconds), capture=True, environment=loopback)
    found = [line for line in ended.output.splitlines() if line.startswith("{")]
    if ended.status or not found:
        raise RuntimeError(f"{ended.killed_for or ended.status}: {error_in(ended.output)}"[:400])
    result: dict[str, Any] = json.loads(found[-1])
    return result


def error_in(output: str) -> str:
    """The first error that a traceback in the output ends with; its last lines without one."""
    lines = output.strip().splitlines()
    errors = [line for line in lines if ERROR.match(line) and "ChildFailedError" not in line]
    return errors[0] if errors else " | ".join(lines[-3:])


def _kill(root: int) -> None:
    """Kill a process and all that it started, whatever sessions those made for themselves."""
    family = [root]
    for process in family:
        # Stopped, it starts nothing more.
        _signal(process, signal.SIGSTOP)
        family += _children(process)
    for process in family:
        _signal(process, signal.SIGKILL)


def _children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        # Past the name, which is in brackets and may hold anything: state and parent.
        with suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def _signal(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def no_later_than(seconds: float) -> Callable[[], str]:
    """A watch that ends a command after so long."""
    end = time.monotonic() + seconds
    return lambda: f"took longer than {seconds:.0f} s" if time.monotonic() > end else ""
