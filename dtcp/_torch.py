"""Every private name of torch that dtcp uses, a function or constant each, with why it is needed.

Versions in parentheses are those of torch in which the name was read. Nothing else in dtcp,
models or parallelize spells a private name of torch; tests/test_imports.py holds that.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch._utils import _get_available_device_type
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group, _set_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Ops.

OpOverload = torch._ops.OpOverload
"""The type of torch.ops.<namespace>.<name>.default: no public name (2.11-2.15)."""


def overload_of(op: CustomOpDef | OpOverload) -> OpOverload:
    """The op behind a definition: what rules and policies are keyed by (2.11-2.15)."""
    return op._opoverload if isinstance(op, CustomOpDef) else op


no_autocast = torch._C._DisableAutocast
"""Inside, no device casts; torch's public context is of one device, and slower (2.11-2.15)."""


def argument_names(op: OpOverload) -> list[str]:
    """Of an op's schema, which has no public reader (2.11-2.15)."""
    return [argument.name for argument in op._schema.arguments]


def packet_of(op: OpOverload) -> Any:
    """All overloads of an op: what torch's registry of FLOPs is keyed by (2.11-2.15)."""
    return op._overloadpacket


def num_results(op: OpOverload) -> int:
    """Of an op's schema, which has no public reader (2.11-2.15)."""
    return len(op._schema.returns)


# DTensor and meshes.


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


def dynamo_error() -> type[Exception]:
    """What dynamo raises where it cannot make a graph: it has no public name (2.11-2.15)."""
    return cast(type[Exception], torch._dynamo.exc.TorchDynamoException)


def dynamo_has(setting: str) -> bool:
    """Whether this torch's dynamo knows a setting: `nested_graph_breaks` is new in 2.13."""
    return hasattr(torch._dynamo.config, setting)


def traced_with(compiled: Callable[_P, _R], settings: Mapping[str, Any]) -> Callable[_P, _R]:
    """A compiled function that is traced under these settings of dynamo, read when it runs.

    torch.compile takes some of them as arguments from 2.13 on, others never (2.15).
    """

    @wraps(compiled)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch._dynamo.config.patch(**settings):
            return compiled(*args, **kwargs)

    return run


def dynamo_limits() -> tuple[int, int]:
    """Graphs of one function that dynamo allows now, and graphs for all of its modules (2.11-2.15).

    The first for modules that it guards alike; no public reader.
    """
    config = torch._dynamo.config
    return config.recompile_limit, config.accumulated_recompile_limit


def graph_limit_error() -> type[Exception]:
    """What dynamo raises at its limit of graphs: it has no public name (2.11-2.15)."""
    return cast(type[Exception], torch._dynamo.exc.FailOnRecompileLimitHit)


def graphs_made() -> int:
    """Graphs made by this process so far: no public counter (2.11-2.15)."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def graphs_and_breaks() -> tuple[int, int]:
    """Graphs made and graph breaks met by this process: no public counters (2.11-2.15)."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def compiled_autograd() -> AbstractContextManager[Any]:
    """Compile backward passes inside, as torchtitan does: by a private switch (2.11-2.15)."""
    context: AbstractContextManager[Any] = torch._dynamo.utils.maybe_enable_compiled_autograd(True)
    return context


def inductor_compilers() -> list[str]:
    """The C++ compilers that inductor looks for, by name (2.11-2.15)."""
    names = torch._inductor.config.cpp.cxx
    return [name for name in (names if isinstance(names, tuple) else (names,)) if name]


def set_inductor_processes(count: int) -> None:
    """Let inductor compile in so many processes, with 1 in this one.

    It reads the environment when it is imported, which is too late in a forked process (2.11-2.15).
    """
    torch._inductor.config.compile_threads = count


def assert_in_graph(condition: Tensor, message: str) -> None:
    """Stop the program when traced code finds the condition false; the host does not wait.

    An `assert` on a tensor waits in eager mode; this has no public spelling (2.11-2.15).
    """
    torch._assert_async(condition, message)


# What a function mode needs to be found again by a backward pass.


def run_backward(
    loss: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """`loss.backward(...)` for a function mode that answers it and stays on while it runs.

    torch's own would ask the mode once more; this goes straight to the engine (2.11-2.15).
    """
    if gradient is None and loss.numel() != 1:
        raise ValueError(
            f"A backward pass starts from a scalar or a gradient, got a loss of shape "
            f"{tuple(loss.shape)}: give gradient, or reduce it."
        )
    gradient = torch.ones_like(loss) if gradient is None else gradient
    keep = create_graph if retain_graph is None else retain_graph
    leaves = () if inputs is None else tuple(inputs)
    torch.autograd.graph._engine_run_backward(
        (loss,),
        (gradient,),
        keep,
        create_graph,
        leaves,
        allow_unreachable=True,
        accumulate_grad=True,
    )


SET_GRAD_ENABLED = torch._C._set_grad_enabled
"""What torch.no_grad calls; a function mode sees it (2.11-2.15)."""


@dataclass(frozen=True)
class _InsideContext:
    """A function that is always called inside a context."""

    context: AbstractContextManager[Any]
    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.context:
            return self.function(*args, **kwargs)


def recompute_inside(context: AbstractContextManager[Any]) -> None:
    """Let a reentrant checkpoint that runs its forward just now recompute inside a context.

    For a mode that sees gradients switched off. torch.utils.checkpoint with use_reentrant=True
    does so in the forward of its autograd function, and in backward calls `ctx.run_function`
    again, when the mode is gone and nobody would notice: its gradients would be those of the
    shard alone. Only the frame of that forward leads to `ctx` (2.11-2.15). Served and not
    refused, since the models whose attention a mode changes are checkpointed by somebody else.
    """
    ctx = _autograd_context()
    run = getattr(ctx, "run_function", None)
    if ctx is not None and run is not None and not isinstance(run, _InsideContext):
        ctx.run_function = _InsideContext(context, run)


def is_recomputed_elsewhere() -> bool:
    """Whether the caller is inside an autograd function that `recompute_inside` cannot reach."""
    ctx = _autograd_context()
    return ctx is not None and not isinstance(getattr(ctx, "run_function", None), _InsideContext)


def _autograd_context() -> Any:
    """`ctx` of the innermost torch.autograd.Function whose forward is running, or None."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, torch._C._FunctionBase):
                return first
        frame = frame.f_back
    return None


StorageInfo = _StorageInfo
"""File, offset and length of an entry, as a checkpoint's metadata hold them (2.11-2.15)."""

set_nested = set_element
"""Sets a value in nested dicts and lists by its path, as load planners do (2.11-2.15)."""

SET_PROCESS_GROUP_TIMEOUT = _set_pg_timeout
"""What torch.distributed.set_timeout is called before 2.14."""

available_device_type = _get_available_device_type
"""The accelerator of this machine, as torchtitan asks for it; None for a CPU (2.11-2.15)."""


def children_of(module: torch.nn.Module) -> Mapping[str, torch.nn.Module | None]:
    """The very dict that holds them, by name; public are copies alone (2.11-2.15)."""
    return module._modules


@contextmanager
def parameters_replaced(module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a module finds these tensors where it has its own parameters (2.11-2.15)."""
    own = dict(module._parameters)
    module._parameters.update(cast(Any, tensors))
    try:
        yield
    finally:
        module._parameters.update(own)


# Runs without ranks or memory.


@contextmanager
def fake_ranks(world_size: int, rank: int) -> Iterator[None]:
    """So many ranks, of which this process plays one: nobody answers (private in 2.11-2.15)."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # DTensor remembers results by equal meshes, and with them the groups of one that is gone.
    _clear_sharding_prop_cache()
    # It would put the rank before each line of every traceback, once more each time.
    hook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()
        sys.excepthook = hook


def fake_tensors() -> FakeTensorMode:
    """Tensors with sizes and no memory; real ones are taken beside them (2.11-2.15)."""
    return FakeTensorMode(allow_non_fake_inputs=True)


real_tensors = unset_fake_temporarily
"""Inside fake tensors' mode, a stretch in which the host reads tables (2.11-2.15)."""


def storage_key(storage: torch.UntypedStorage) -> int:
    """One number for all views of a piece of memory, fake ones included (2.11-2.15)."""
    return storage._cdata


flat_leaves, put_back = tree_flatten, tree_unflatten
"""Nested lists, tuples and dicts, taken apart into leaves and put together (2.11-2.15)."""


def changes_of(x: Tensor) -> int:
    """How often a tensor has been written to in place (2.11-2.15)."""
    return x._version
