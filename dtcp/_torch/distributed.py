"""Private names of torch: groups, meshes, DTensor, FSDP and checkpoints."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group, _set_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.library import CustomOpDef

from dtcp._torch.ops import OpOverload, overload_of


def set_dtensor_rule(op: CustomOpDef | OpOverload, rule: Callable[..., Any]) -> None:
    """Give DTensor rule(op, args, kwargs) -> results, for an op; plain tensors never reach it.

    The public register_sharding applies a rule to every mesh axis alike, and so takes a sequence
    that is sharded on the wrong one (2.11-2.15).
    """
    DTensor._op_dispatcher._custom_op_handlers[overload_of(op)] = rule


def local_tensor(x: DTensor) -> Tensor:
    """The shard itself, inside a rule: to_local() would record an autograd node (2.11-2.15)."""
    return x._local_tensor


def wait_for_shard(x: Tensor) -> None:
    """Wait for the collective that the shard of a DTensor is still the result of, if it is.

    A graph that was compiled for a shard on its way is taken for one that has arrived, too, and
    breaks on it (2.13, pytorch #187073).
    """
    if isinstance(x, DTensor) and isinstance(x._local_tensor, AsyncCollectiveTensor):
        x._local_tensor = x._local_tensor.trigger_wait()


def process_group(name: str) -> dist.ProcessGroup:
    """The group of that name: no public way from one to the other (2.11-2.15)."""
    return _resolve_process_group(cast("dist.GroupName", name))


SET_PROCESS_GROUP_TIMEOUT = _set_pg_timeout
"""What torch.distributed.set_timeout is called before 2.14."""


def flattened(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """All axes of a mesh as one; torch documents it under this name only (2.11-2.15)."""
    return mesh._flatten(name)


def unflattened(axis: DeviceMesh, sizes: Sequence[int], names: Sequence[str]) -> DeviceMesh:
    """A 1-D mesh as one of several axes, the last one fastest (2.11-2.15)."""
    return axis._unflatten(0, tuple(sizes), tuple(names))


def concatenated(meshes: Sequence[DeviceMesh]) -> DeviceMesh:
    """Axes of one root mesh side by side, flattened ones too, which slicing refuses (2.11-2.15)."""
    return DeviceMesh._concatenate(list(meshes))


def start_all_to_all(x: Tensor, receive: list[int], send: list[int], group: str) -> Tensor:
    """An all_to_all of rows that is on its way when this returns; `arrived` waits for it.

    torch keeps rows and result alive until then; its public collectives hand out a Work, which
    no op can return (2.11-2.15).
    """
    return cast(Tensor, torch.ops._c10d_functional.all_to_all_single(x, receive, send, group))


def arrived(flying: Tensor) -> Tensor:
    """Wait for a tensor of start_all_to_all; one that is there already is handed on (2.11-2.15)."""
    return cast(Tensor, torch.ops._c10d_functional.wait_tensor(flying))


def fsdp_param_groups(unit: FSDPModule) -> list[Any] | tuple[Any, ...]:
    """The groups of parameters that a unit communicates; before 2.13 a tuple, of at most one.

    A list, for experts on a mesh of their own. There is no public way to a group's dtype.
    """
    state: Any = unit._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return cast(list[Any], state._fsdp_param_groups)
    return () if state._fsdp_param_group is None else (state._fsdp_param_group,)


def has_param_meshes() -> bool:
    """Whether parameters of one FSDP unit may lie on several meshes (2.13; not 2.11)."""
    from torch.distributed.fsdp._fully_shard import _fsdp_common

    return hasattr(_fsdp_common, "ShardPlacementResult")


def param_mesh(mesh: DeviceMesh) -> Callable[[Shard], Any]:
    """What a shard_placement_fn returns for a parameter on a mesh of its own, by placement (2.13).

    Public for the placement alone; torch 2.11 has one mesh per unit. All parameters of a mesh
    have one and the same object for it.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_common, _fsdp_init

    mesh_info: Any = _fsdp_init._get_mesh_info(mesh, None)
    return lambda placement: _fsdp_common.ShardPlacementResult(placement, mesh_info)


def empty_param_group_like(group: Any) -> Any:
    """A group without parameters, on the mesh and under the policies of another (2.13)."""
    return type(group)(
        [],
        group.modules,
        group.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        None,
        group.mp_policy,
        group.offload_policy,
    )


StorageInfo = _StorageInfo
"""File, offset and length of an entry, as a checkpoint's metadata hold them (2.11-2.15)."""

set_nested = set_element
"""Sets a value in nested dicts and lists by its path, as load planners do (2.11-2.15)."""
