"""Process groups by name: what our ops take, since a graph holds no groups."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtcp._torch.collectives import group_of as group_of


def group_name(mesh: DeviceMesh) -> str:
    """The name of a 1-D mesh's process group: what an op takes, since a graph holds no groups."""
    if mesh.ndim != 1:
        raise ValueError(
            f"A collective runs along one axis, got mesh.ndim={mesh.ndim}: "
            f"slice the mesh, as in mesh['cp']."
        )
    return axis_group_name(mesh, 0)


def axis_group_name(mesh: DeviceMesh, index: int) -> str:
    """`group_name` of one axis of a larger mesh; torch 2.11 cannot slice a mesh while tracing."""
    return mesh.get_group(index).group_name


def group_sizes(names: Sequence[str]) -> list[int]:
    """How many ranks each group has, where a plan is applied: an op takes it beside the name.

    In a graph neither the op's fake asks its group nor is traced code able to.
    """
    return [dist.get_world_size(group_of(name)) for name in names]


def rank_of_process() -> int:
    """Among all, of the default process group; 0 where there is none."""
    return dist.get_rank() if dist.is_initialized() else 0


class Members(NamedTuple):
    """Who is in a process group."""

    place: int
    """This rank's."""
    ranks: tuple[int, ...]
    """Global ranks, by place."""


def members_of(name: str) -> Members | None:
    """Who is in the group of that name now; None: there is none. Communicates nothing."""
    try:
        group = group_of(name)
    except RuntimeError:  # what torch knows no group by, as after destroy_process_group
        return None
    return Members(dist.get_rank(group), tuple(dist.get_process_group_ranks(group)))


def in_words(ranks: Sequence[int]) -> str:
    """The ranks of a group; of many that are evenly spaced the first and the last one say all."""
    steps = {after - before for before, after in pairwise(ranks)}
    if len(ranks) < 3 or len(steps) > 1:
        return ", ".join(map(str, ranks))
    step = steps.pop()
    return f"{ranks[0]} to {ranks[-1]}" + ("" if step == 1 else f" in steps of {step}")


def backend_of(group: dist.ProcessGroup, device: str) -> str | None:
    """What carries tensors of a device, of a configuration such as "cpu:gloo,cuda:nccl".

    `dist.get_backend` has one answer for all devices: that text, or "undefined" where
    init_process_group was given no backend.
    """
    pairs = (part.split(":") for part in dist.get_backend_config(group).split(","))
    return {pair[0]: pair[-1] for pair in pairs}.get(device)


def connect(name: str, device: str) -> None:
    """Make the links of a group while all of its ranks are here: call where a plan is applied.

    NCCL makes them at the first call on a group and waits for all of its ranks; a ring's first
    transfer may concern two ranks only, where documents leave the others nothing to send. No
    barrier does it for sure: a group that carries tensors of the host, too, has it over gloo.

    Args:
        device: the type of those that are going to talk.
    """
    group = group_of(name)
    if backend_of(group, device) == "nccl":
        dist.all_reduce(torch.zeros(1, device=device), group=group)


def gather_flat(out: Tensor, x: Tensor, *, group: dist.ProcessGroup) -> None:
    """The one-tensor all-gather under the name that this torch does not warn of."""
    # Torch 2.13 renames it; the old name alone is in 2.11.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, x, group=group)


def axis_of(name: str, device: torch.device) -> DeviceMesh:
    """The axis of that group, inside an op's body: what the functions below take."""
    return DeviceMesh.from_group(group_of(name), device.type)
