"""Run a command with an end: past it, the command and all that it started are killed."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

POLL = 0.1


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
            os.killpg(started.pid, signal.SIGKILL)
            output, _ = started.communicate()
            return Ended(None, reason, output or "")


def no_later_than(seconds: float) -> Callable[[], str]:
    """A watch that ends a command after so long."""
    end = time.monotonic() + seconds
    return lambda: f"took longer than {seconds:.0f} s" if time.monotonic() > end else ""
