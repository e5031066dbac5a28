"""The parameter groups of FSDP2, and parameters on meshes of their own."""

from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import Shard


def fsdp_param_groups(unit: FSDPModule) -> list[Any] | tuple[Any, ...]:
    """The groups of parameters that a unit communicates; before 2.13 a tuple, of at most one.

    A list, for experts on a mesh of their own. There is no public way to a group's dtype.
    """
    return _groups_of(unit._get_fsdp_state())


def _groups_of(state: Any) -> list[Any] | tuple[Any, ...]:
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return () if state._fsdp_param_group is None else (state._fsdp_param_group,)


def trained_groups_resharded_after_forward(root: FSDPModule, unit: FSDPModule) -> list[Any]:
    """Those of a unit of this root's (2.13-2.15).

    A root without a choice of its own stays gathered, which its groups show once it ran.
    """
    if unit is root and unit._get_fsdp_state()._auto_reshard_after_forward:
        return []
    groups = fsdp_param_groups(unit)
    return [x for x in groups if x.post_forward_mesh_info is not None and reducing_ranks(x)]


def param_groups_behind(x: Tensor) -> Iterator[Any]:
    """The groups of the model whose output a tensor is, by FSDP's hook on it; none of another's.

    On 2.11-2.15 the outputs of a root call the root's state when their gradient arrives.
    """
    for hook in (getattr(x, "_backward_hooks", None) or {}).values():
        context = getattr(getattr(hook, "__self__", None), "_state_ctx", None)
        for state in getattr(context, "all_states", ()):
            yield from _groups_of(state)


def reducing_ranks(group: Any) -> int:
    """Over how many ranks a group reduces gradients; 0 where none of its parameters has any."""
    trained = any(each.sharded_param.requires_grad for each in group.fsdp_params)
    return cast(int, group.mesh_info.mesh.size()) if trained else 0


def averaging_ranks(group: Any) -> int:
    """Over how many ranks a group averages gradients, nobody having said what to divide them by.

    What `set_gradient_divide_factor` sets has no public way back.
    """
    return 0 if group.gradient_divide_factor is not None else reducing_ranks(group)


def weights_held_by(unit: FSDPModule) -> Iterator[Tensor]:
    """The parameters that a unit shards, as shards and, where they were ever, as gathered."""
    for group in fsdp_param_groups(unit):
        for each in group.fsdp_params:
            yield each.sharded_param
            if hasattr(each, "_unsharded_param"):
                yield each._unsharded_param


def has_param_meshes() -> bool:
    """Whether parameters of one FSDP unit may lie on several meshes (2.13-2.15; not 2.11)."""
    from torch.distributed.fsdp._fully_shard import _fsdp_common

    return hasattr(_fsdp_common, "ShardPlacementResult")


def param_mesh(mesh: DeviceMesh) -> Callable[[Shard], Any]:
    """What a shard_placement_fn returns for a parameter on another mesh, by placement (2.13-2.15).

    Public for the placement alone; torch 2.11 has one mesh per unit. All parameters of a mesh
    have one and the same object for it.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_common, _fsdp_init

    mesh_info: Any = _fsdp_init._get_mesh_info(mesh, None)
    return lambda placement: _fsdp_common.ShardPlacementResult(placement, mesh_info)


def empty_param_group_like(group: Any, policy: MixedPrecisionPolicy) -> Any:
    """A group without parameters, on the mesh of another, under a policy of its own (2.13-2.15)."""
    return type(group)(
        [],
        group.modules,
        group.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        None,
        policy,
        group.offload_policy,
    )
