"""Processes that a test watches while they run: what they have said, and how they are ended."""

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness import forkserver
from tests.harness.patience import Patience
from tests.harness.run_script import ROOT, be_script


class Forked:
    """A forked script in the terms of subprocess.Popen.

    Args:
        process: multiprocessing's.
    """

    def __init__(self, process: Any) -> None:
        self.process, self.pid = process, process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()


@dataclass
class Started:
    """A process, forked or not, and what it says."""

    process: subprocess.Popen[bytes] | Forked
    output: Any  # a file with a descriptor

    def said(self) -> str:
        """All of its output so far."""
        return os.pread(self.output.fileno(), 1 << 24, 0).decode(errors="replace")

    def wait_for(self, text: str, seconds: float = 120.0) -> None:
        """Return as soon as it has said this."""
        patience = Patience(seconds)
        while text not in self.said():
            assert self.process.poll() is None, f"ended before {text!r}:\n{self.said()}"
            assert patience.left(), f"no {text!r} in {seconds:g} s:\n{self.said()}"
            time.sleep(0.05)

    def wait(self, seconds: float = 120.0) -> int:
        """Its exit code, once it has ended."""
        patience = Patience(seconds)
        while self.process.poll() is None:
            assert patience.left(), f"still ran after {seconds:g} s:\n{self.said()}"
            time.sleep(0.05)
        return self.process.wait()


@contextlib.contextmanager
def forked_script(script: Path | str, *arguments: str) -> Iterator[Started]:
    """A Python script as a person starts it, without an import's time; killed at the end.

    Args:
        script: its path; from the root of the project, where it is relative.
    """
    with tempfile.NamedTemporaryFile() as output:
        files = (output.name, output.name)
        process = Forked(
            forkserver.start(be_script, ROOT / script, arguments, {}, files, daemon=False)
        )
        try:
            yield Started(process, output)
        finally:
            process.kill()
            process.wait()
