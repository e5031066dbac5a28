"""Two network namespaces as two hosts, with a cable between them that can be cut."""

import contextlib
import ctypes
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.harness import forkserver
from tests.harness.run_script import ROOT, be_script
from tests.harness.started import Forked, Started

CLONE_NEWNET = 0x40000000
"""Of Linux' setns(2): the network is what a process enters."""


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
    processes: list[Started] = field(default_factory=list)

    def ip(self, *arguments: str) -> None:
        """Run ip(8) on this host."""
        _ip("-netns", self.name, *arguments)

    def start(self, script: str, *arguments: str) -> Started:
        """Fork a script of the project on this host, which talks to others over the cable."""
        output = tempfile.NamedTemporaryFile()  # noqa: SIM115
        environment = {"GLOO_SOCKET_IFNAME": self.cable}
        files = (output.name, output.name)
        process = forkserver.start(
            _be_on_host, self.name, ROOT / script, arguments, environment, files, daemon=False
        )
        self.processes.append(Started(Forked(process), output))
        return self.processes[-1]


def _be_on_host(name: str, *script: Any) -> None:
    """Enter a host's network, as all threads and processes that this one starts; run a script."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as network:
        if libc.setns(network.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {name} was refused")
    be_script(*script)


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
