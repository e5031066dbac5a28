"""What a run is planned on: GPUs, nodes, and the rates that they attain."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

GB = 10**9


@dataclass(frozen=True)
class Cluster:
    """GPUs and what joins them.

    Args:
        gpus: in all.
        per_node: GPUs of a node.
        memory: bytes of a GPU.
        reserved: bytes of it that no tensor gets: the CUDA context, NCCL's buffers, and what the
            allocator leaves between tensors.
        flops: dense bf16 FLOP/s of a GPU, by its data sheet.
        matmul, mixer: the share of it that matmuls and attention kernels attain.
        inside, between: bytes/s a GPU receives inside a node, and from other nodes, attained.
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

    @property
    def usable(self) -> int:
        return self.memory - self.reserved

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)

    def __str__(self) -> str:
        return f"{self.gpus} x {self.name} in {self.nodes} node{'s' * (self.nodes > 1)}"

    def assumptions(self) -> list[str]:
        """What every figure rests on, in words."""
        return [
            f"A {self.name} has {self.memory / GB:.0f} GB, {self.reserved / GB:.0f} of them for "
            f"CUDA, NCCL and the allocator.",
            f"Matmuls attain {self.matmul:.0%} and attention {self.mixer:.0%} of "
            f"{self.flops / 1e12:.0f} TFLOP/s (dense bf16, data sheet).",
            f"A GPU receives {self.inside / GB:.0f} GB/s inside a node of {self.per_node} and "
            f"{self.between / GB:.0f} GB/s from other nodes (what of the data sheet is attained; "
            f"not measured).",
            "Gathering weights overlaps with compute; a ring overlaps with its attention; other "
            "transfers over cp, tp and ep do not. Work beside matmuls and mixers takes no time.",
            "Keys and states travel straight from owner to user, in one hop: what several GPUs of "
            "a node need comes to it several times.",
            "Routers choose every expert as often: a fuller one makes its rank wait for it.",
        ]


KINDS: Mapping[str, Cluster] = {
    "H100": Cluster("H100", 1, 80 * GB, 989e12, 360 * GB),
    "H200": Cluster("H200", 1, 141 * GB, 989e12, 360 * GB),
    "B200": Cluster("B200", 1, 180 * GB, 2250e12, 720 * GB),
}
"""By data sheet: NVLink 450 (900) GB/s and a 400 Gb/s network port each way and GPU, 80 and 90 % of
which a large message attains."""


def cluster_of(text: str) -> Cluster:
    """Read 64xH100, or a JSON file of a Cluster's fields, as --collect writes it.

    Raises:
        ValueError: naming what was read and what would do.
    """
    if text.endswith(".json"):
        return _of_file(Path(text))
    found = re.fullmatch(r"([1-9]\d*)x(\w+)", text)
    if found is None or found[2].upper() not in KINDS:
        raise ValueError(
            f"A cluster is so many GPUs of a kind, got --cluster {text}: give one as 8xH100, of "
            f"the kinds {', '.join(KINDS)}, or a JSON file."
        )
    return replace(KINDS[found[2].upper()], gpus=int(found[1]))


def cluster_here(gpus: int) -> Cluster:
    """This machine's kind of GPU, so many of them; where it has none of KINDS, H100s."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    kind = next((kind for kind in KINDS if kind in name), "H100")
    return replace(KINDS[kind], gpus=gpus)


def _of_file(path: Path) -> Cluster:
    try:
        given = json.loads(path.read_text())
        kind = KINDS.get(given.pop("kind", ""), None)
        base = {} if kind is None else asdict(kind)
        return Cluster(**{**base, **given})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        names = ", ".join(each.name for each in fields(Cluster))
        raise ValueError(
            f"A cluster's file is JSON with the fields {names} (or a kind and what differs), got "
            f"{str(path)!r}: {error}."
        ) from None
