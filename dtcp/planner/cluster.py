"""What a run is planned for: GPUs, nodes, and the rates that they attain."""

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from math import inf
from pathlib import Path

import torch

from dtcp.sequence.arguments import check_ints

GB = 10**9


@dataclass(frozen=True)
class Cluster:
    """GPUs and what joins them.

    Args:
        gpus: in all.
        memory: bytes of a GPU.
        reserved: bytes of it that tensors cannot use: the CUDA context, NCCL's buffers, and what
            the allocator leaves between tensors.
        flops: dense bf16 FLOP/s of a GPU, by its data sheet.
        matmul, mixer: the share of it that matmuls and attention kernels attain.
        inside, between: bytes/s a GPU receives inside a node, and from other nodes, attained.
        per_node: GPUs that a node has; all nodes run equally many of them.
    Raises:
        ValueError: a number of GPUs that does not divide evenly among nodes.
    """

    name: str
    gpus: int
    memory: int
    flops: float
    inside: float
    between: float = 45 * GB
    per_node: int = 8
    reserved: int = 4 * GB
    matmul: float = 0.65
    mixer: float = 0.5

    def __post_init__(self) -> None:
        check_ints("A cluster", least=1, gpus=self.gpus, per_node=self.per_node)
        for name in ("memory", "flops", "inside", "between", "matmul", "mixer"):
            rate = getattr(self, name)
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < inf:
                raise ValueError(f"A cluster has numbers above 0, got {name}={rate!r}: correct it.")
        if not 0 <= self.reserved < self.memory:
            raise ValueError(
                f"A GPU has memory beside what is reserved of it, got reserved={self.reserved!r} "
                f"of memory={self.memory!r} bytes: correct them."
            )
        if self.gpus % self.nodes:
            least = self.gpus - self.gpus % self.per_node
            raise ValueError(
                f"Nodes run equally many GPUs, got {self.gpus} {self.name} in {self.nodes} nodes "
                f"of up to {self.per_node}: take {least} or {least + self.per_node}, or give "
                f"per_node in a cluster's file."
            )

    @property
    def usable(self) -> int:
        return self.memory - self.reserved

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)

    @property
    def ranks_per_node(self) -> int:
        """GPUs of each node that are used."""
        return self.gpus // self.nodes

    def seconds(self, received: float, crossing: float) -> float:
        """The time to receive so many bytes, of which `crossing` come from other nodes."""
        return crossing / self.between + (received - crossing) / self.inside

    def __str__(self) -> str:
        said = f"{self.gpus} x {self.name} in {self.nodes} node{'s' * (self.nodes > 1)}"
        filled = self.nodes == 1 or self.ranks_per_node == self.per_node
        return said if filled else f"{said} of {self.ranks_per_node}"

    def assumptions(self) -> list[str]:
        """What every figure rests on, in words."""
        return [
            f"Each {self.name} has {self.memory / GB:.0f} GB, {self.reserved / GB:.0f} of them for "
            f"CUDA, NCCL and the allocator.",
            f"Matmuls attain {self.matmul:.0%} and attention {self.mixer:.0%} of "
            f"{self.flops / 1e12:.0f} TFLOP/s (dense bf16, data sheet).",
            f"A GPU receives {self.inside / GB:.0f} GB/s inside a node of {self.ranks_per_node} "
            f"and {self.between / GB:.0f} GB/s from other nodes (what of the data sheet is "
            f"attained; not measured).",
            "Gathering weights overlaps with compute; a ring overlaps with its attention; other "
            "transfers over cp, tp and ep do not. Work beside matmuls and mixers takes no time.",
            "Routers choose every expert as often, and tokens their experts independently; tokens "
            "travel by all_to_all. A fuller expert makes its rank wait for it.",
        ]


KINDS: Mapping[str, Cluster] = {
    "H100": Cluster("H100", 1, 80 * GB, 989e12, 360 * GB),
    "H200": Cluster("H200", 1, 141 * GB, 989e12, 360 * GB),
    "B200": Cluster("B200", 1, 180 * GB, 2250e12, 720 * GB),
}
"""By data sheet, each way and per GPU: NVLink at 450 (900) GB/s and a 400 Gb/s network port; large
messages attain 80 and 90 % of these."""


def cluster_of(text: str) -> Cluster:
    """Read 64xH100, or a JSON file of a Cluster's fields, as --collect writes it.

    Raises:
        ValueError: naming what was read and what would do.
    """
    if text.endswith(".json"):
        return _of_file(Path(text))
    match = re.fullmatch(r"([1-9]\d*)x(\w+)", text)
    if match is None or match[2].upper() not in KINDS:
        raise ValueError(
            f"A cluster is so many GPUs of a kind, got --cluster {text}: give one as 8xH100, of "
            f"the kinds {', '.join(KINDS)}, or a JSON file."
        )
    return replace(KINDS[match[2].upper()], gpus=int(match[1]))


def cluster_here(gpus: int, ranks_per_node: int = 0) -> Cluster:
    """A cluster of this machine's kind of GPU; of H100s where it has none of KINDS.

    Args:
        ranks_per_node: 0 where it is not known.
    """
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    kind = KINDS[next((kind for kind in KINDS if kind in name), "H100")]
    each = ranks_per_node or min(gpus, kind.per_node)
    return replace(kind, gpus=gpus, per_node=each if gpus % each == 0 else gpus)


def _of_file(path: Path) -> Cluster:
    names = [each.name for each in fields(Cluster)]
    try:
        values = json.loads(path.read_text())
        kind = values.pop("kind", "")
        base = asdict(KINDS[kind]) if kind in KINDS else {}
        base.pop("gpus", None)  # how many there are is not a kind's to say
        if kind and not base:
            raise ValueError(f"{kind!r} is no kind, so say name, memory, flops and inside")
        if unknown := [name for name in values if name not in names]:
            raise ValueError(f"{', '.join(unknown)} is no field")
        values = {**base, **values}
        required = (each.name for each in fields(Cluster) if each.default is MISSING)
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"it does not say {', '.join(missing)}")
        return Cluster(**values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"A cluster's file is JSON with the fields {', '.join(names)} (or gpus, a kind of "
            f"{', '.join(KINDS)}, and what differs), got {str(path)!r}: {str(error).rstrip('.')}."
        ) from None
