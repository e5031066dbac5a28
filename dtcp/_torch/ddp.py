"""What torch's older data parallelism knows of itself: DDP, `replicate`, FSDP1 (2.11-2.15)."""

import sys
from collections.abc import Callable
from inspect import getclosurevars, isfunction
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_REPLICATE = "torch.distributed._composable.replicate"


def running_ddp() -> DistributedDataParallel | None:
    """The one in whose forward pass this is; None outside of any."""
    return DistributedDataParallel._get_active_ddp_module()


def reduces_as_gradients_arrive(module: nn.Module) -> bool:
    """Whether it reduces gradients in hooks of their accumulation, which torch.autograd.grad skips.

    DDP, the composable `replicate` and FullyShardedDataParallel do; fully_shard does not.
    """
    return isinstance(module, DistributedDataParallel) or _is_replicated(module) or is_fsdp1(module)


def has_arrival_hooks(weight: nn.Parameter) -> bool:
    """Whether register_post_accumulate_grad_hook was called of it: no public reader (2.11-2.15)."""
    return bool(weight._post_accumulate_grad_hooks)


def averaging_ranks_of_ddp(ddp: DistributedDataParallel) -> int:
    """Over how many ranks it averages gradients: 1 where a hook of somebody's reduces them."""
    sums = any(not _averages(hook) for hook, _ in ddp._comm_hooks)
    return 1 if sums else dist.get_world_size(ddp.process_group)


def averaging_ranks_of_replicated(module: nn.Module) -> int:
    """As `averaging_ranks_of_ddp`, of what the composable `replicate` was called with; else 1."""
    if not _is_replicated(module):
        return 1
    composable = sys.modules[_REPLICATE]
    state: Any = composable.replicate.state(module)
    if state.has_initialized:
        return averaging_ranks_of_ddp(state._ddp)
    given = [(*args, *kwargs.values()) for args, kwargs in state._comm_hook_args]
    if any(callable(x) and not _averages(x) for each in given for x in each):
        return 1
    mesh = state._init_kwargs.get("device_mesh")
    group = None if mesh is None else mesh.get_group()
    return dist.get_world_size(state._init_kwargs.get("process_group", group))


def averaging_ranks_of_fsdp1(module: nn.Module) -> int:
    """Over how many ranks a FullyShardedDataParallel averages gradients; 1 of other modules."""
    if not is_fsdp1(module):
        return 1
    state: Any = module
    if state._comm_hook is not None and not _averages(state._comm_hook):
        return 1
    between = getattr(state, "_inter_node_pg", None)
    nodes = 1 if between is None else dist.get_world_size(between)
    return dist.get_world_size(state.process_group) * nodes


def _is_replicated(module: nn.Module) -> bool:
    # Only who has imported it can have called it.
    composable = sys.modules.get(_REPLICATE)
    return composable is not None and isinstance(module, composable.DDP)


def is_fsdp1(module: nn.Module) -> bool:
    """Whether it is a FullyShardedDataParallel."""
    fsdp1 = getattr(sys.modules["torch.distributed.fsdp"], "FullyShardedDataParallel", None)
    return fsdp1 is not None and isinstance(module, fsdp1)


def _averages(hook: Callable[..., Any]) -> bool:
    """Whether a communication hook is torch's own, which average; of a wrapper, the one inside."""
    while isfunction(hook) and callable(inner := getclosurevars(hook).nonlocals.get("hook")):
        hook = inner
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.algorithms")
