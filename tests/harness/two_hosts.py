"""Two network namespaces as two hosts, with a cable between them that can be cut."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.harness.patience import Patience

ROOT = Path(__file__).parents[2]


def missing_for_hosts() -> str:
    """What keeps this machine from having namespaces; empty if nothing does."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "Linux with iproute2 (apt install iproute2)"
    name = f"dtcp-try-{secrets.token_hex(4)}"
    tried = subprocess.run(
        ["ip", "netns", "add", name], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        return f"the right to make network namespaces (be root): {tried.stderr.strip()}"
    _ip("netns", "delete", name)
    return ""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@dataclass
class Host:
    """A namespace with an address, and what was started in it."""

    name: str
    address: str
    cable: str
    processes: list["Started"] = field(default_factory=list)

    def ip(self, *arguments: str) -> None:
        """Run ip(8) on this host."""
        _ip("-netns", self.name, *arguments)

    def start(self, *command: str) -> "Started":
        """Start a command on this host, which talks to others over the cable."""
        output = tempfile.TemporaryFile()  # noqa: SIM115
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.cable},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        self.processes.append(Started(process, output))
        return self.processes[-1]


@dataclass
class Started:
    """A process of a host, and what it says."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]

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
        return self.process.returncode


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Hosts that reach each other, and nobody else; whatever runs there is killed at the end."""
    # No process id: what a session that was killed left behind has one that comes again.
    mark = secrets.token_hex(4)
    hosts = tuple(Host(f"dtcp-{mark}-{i}", f"10.77.0.{i + 1}", f"cp{mark}{i}") for i in range(2))
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            host.ip("link", "set", "lo", "up")
        first, second = hosts
        _ip("link", "add", first.cable, "type", "veth", "peer", "name", second.cable)
        for host in hosts:
            _ip("link", "set", host.cable, "netns", host.name)
            host.ip("address", "add", f"{host.address}/24", "dev", host.cable)
            host.ip("link", "set", host.cable, "up")
        yield first, second
    finally:
        for host in hosts:
            for started in host.processes:
                started.process.kill()
                started.process.wait()
                started.output.close()
            # The cable goes with the namespaces.
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)
