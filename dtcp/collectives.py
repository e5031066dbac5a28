"""Collectives along one axis of a mesh."""

from typing import cast

from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# Private in torch 2.11 to 2.15, with no public function from a group's name to the group.
from torch.distributed.distributed_c10d import _resolve_process_group


def group_name(mesh: DeviceMesh) -> str:
    """The name of a 1-D mesh's process group: what an op takes, since a graph holds no groups."""
    return cast(str, mesh.get_group().group_name)


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of that name, inside an op's body."""
    return _resolve_process_group(name)
