"""DTensor rules: what attention means when its inputs are sharded.

Our ops take DTensors whose sequence is sharded on exactly the axis the op talks over; heads and
batch may be sharded on other axes. Any other placement raises: a rule that torch applied to
every axis alike would accept a sequence sharded over tp, and be wrong without a word.

Rules are entries in DTensor's table of handlers (torch 2.11-2.15 keep it in the private
`DTensor._op_dispatcher`); plain tensors never reach them.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dtcp.collectives import axis_group_name
from dtcp.kernels.op import AttentionOp

SEQ, HEADS = 1, 2  # dims of [B, L, H, D], and of lse [B, L, H]
KV_HEADS = 7  # its place among a backward op's arguments after grad_out


def install(op: AttentionOp) -> None:
    """Let an attention op take DTensors. Installing twice is installing once."""
    handle(op.forward._opoverload, _forward)
    handle(op.backward._opoverload, _backward)


def handle(op: torch._ops.OpOverload, rule: Callable[..., Any]) -> None:
    """Give DTensor a rule for an op: rule(op, args, kwargs) -> results."""
    DTensor._op_dispatcher._custom_op_handlers[op] = rule


class CollectiveCalls(TorchDispatchMode):
    """Counts the collectives of torch inside: those of DTensor and FSDP; ours count themselves.

    torch's own CommDebugMode follows modules, too, and loses its way where one of several is
    called on DTensors (2.13). Makes dynamo run eager, as every mode of its kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # What it communicates comes by again, on local tensors.
            return NotImplemented
        name = func.name()
        if name.startswith(("_c10d_functional::", "c10d::")) and "wait_tensor" not in name:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def check_placements(name: str, tensors: Sequence[Tensor], axis: str) -> None:
    """Refuse inputs unless the sequence, and nothing else of it, is sharded on the axis.

    Args:
        axis: name of the process group the op talks over.
    """
    found = [(x.device_mesh, x.placements) if isinstance(x, DTensor) else None for x in tensors]
    if found[0] is None or any(at != found[0] for at in found):
        raise ValueError(
            f"{name} takes q, k and v sharded alike, got (mesh, placements)={found}, None for a "
            f"plain tensor: redistribute them to one placement."
        )
    mesh, placements = found[0]
    for index, placement in enumerate(placements):
        here = axis_group_name(mesh, index) == axis
        allowed: tuple[Placement, ...] = (Shard(SEQ),) if here else _ELSEWHERE
        if placement not in allowed:
            raise ValueError(
                f"{name} talks over one mesh axis, on which the sequence is sharded, got "
                f"placement={placement} on axis {index} of {mesh}: place it as one of {allowed}."
            )
    if Shard(SEQ) not in placements:
        raise ValueError(
            f"{name} talks over a mesh axis, got inputs on {mesh}, which is not over it: use the "
            f"mesh the plan was applied on."
        )


_ELSEWHERE = (Replicate(), Shard(0), Shard(HEADS))


def _forward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    q, k, v = args[:3]
    groups = args[7]
    check_placements(str(op), (q, k, v), groups[0])
    out, saved = op(*_local(args), **kwargs)
    # What is kept for backward stays local: nobody but the backward op reads it.
    return _wrap(out, q), saved


def _backward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    grad_out, *rest = args
    like = next(x for x in (*rest, grad_out) if isinstance(x, DTensor))
    if grad_out.placements != like.placements:
        grad_out = grad_out.redistribute(like.device_mesh, like.placements)
    kv_heads = rest[KV_HEADS] // _shards(like, HEADS)
    rest = [*rest[:KV_HEADS], kv_heads, *rest[KV_HEADS + 1 :]]
    *grads, dsink = op(*_local((grad_out, *rest)), **kwargs)
    return (*(_wrap(grad, like) for grad in grads), dsink)


def _shards(x: DTensor, dim: int) -> int:
    """Parts that a dim is cut into."""
    sizes = (x.device_mesh.size(i) for i, p in enumerate(x.placements) if p == Shard(dim))
    return prod(sizes)


def _local(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tree_map_only(DTensor, lambda x: x._local_tensor, args)


def _wrap(local: Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False)
