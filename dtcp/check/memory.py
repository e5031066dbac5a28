"""How much memory a check takes, estimated before it runs."""

import os
from dataclasses import dataclass
from pathlib import Path

BYTES = 8
"""Bytes of a number in fp64, in which models are compared."""

COPIES = 4
"""Of the parameters on each rank: of the model on one device and of that on the mesh, weights and
gradients; those on the mesh are whole before they are shards."""

PROCESS = 150 * 2**20
"""Bytes of each rank beside its tensors; more where it compiles."""
COMPILER = 250 * 2**20

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a check will take on this machine, and those that are free."""

    parameters: int
    ranks: int
    needed: int
    free: int

    @classmethod
    def of(cls, parameters: int, ranks: int, *, compiles: bool) -> "MemoryEstimate":
        tensors = BYTES * parameters * (1 + COPIES * ranks)
        processes = ranks * (PROCESS + COMPILER * compiles)
        return cls(parameters, ranks, tensors + processes, _free_memory())

    def __str__(self) -> str:
        return (
            f"memory: about {_gigabytes(self.needed)} for {self.parameters:,} parameters in fp64 "
            f"on {self.ranks} ranks of this machine, {_gigabytes(self.free)} are free"
        )

    def check(self) -> None:
        """Stop before memory runs out.

        Raises:
            ValueError: less is free than is needed.
        """
        if self.needed > self.free:
            raise ValueError(
                f"A check holds the model {1 + COPIES * self.ranks} times in fp64, got "
                f"{self.parameters:,} parameters, which take {_gigabytes(self.needed)} where "
                f"{_gigabytes(self.free)} are free: check a smaller model (a config.json is "
                f"shrunk; --set num_hidden_layers=2), or on fewer ranks."
            )


def _free_memory() -> int:
    """Bytes that this process and its children may still take, by the machine and its cgroup."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _MEMINFO.exists():
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        most = (_CGROUP / "memory.max").read_text().strip()
        taken = int((_CGROUP / "memory.current").read_text())
    except OSError:
        return free
    return free if most == "max" else min(free, int(most) - taken)


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
