"""Device meshes whose axes are merged, split and put side by side."""

from collections.abc import Sequence

from torch._utils import _get_available_device_type
from torch.distributed.device_mesh import DeviceMesh

available_device_type = _get_available_device_type
"""The accelerator of this machine, as torchtitan asks for it; None for a CPU (2.11-2.15)."""


def flattened(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """All axes of a mesh as one; torch documents it under this name only (2.11-2.15)."""
    return mesh._flatten(name)


def unflattened(axis: DeviceMesh, sizes: Sequence[int], names: Sequence[str]) -> DeviceMesh:
    """A 1-D mesh as one of several axes, the last one fastest (2.11-2.15)."""
    return axis._unflatten(0, tuple(sizes), tuple(names))


def concatenated(meshes: Sequence[DeviceMesh]) -> DeviceMesh:
    """Axes of one root mesh side by side, flattened ones too, which slicing refuses (2.11-2.15)."""
    return DeviceMesh._concatenate(list(meshes))
