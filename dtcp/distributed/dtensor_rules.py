"""DTensor rules: what attention means when its inputs are sharded.

Our ops take DTensors whose sequence is sharded on exactly the axis the op talks over; heads and
batch may be sharded on other axes. Any other placement raises: a rule that torch applied to
every axis alike would accept a sequence sharded over tp, and be wrong without a word.

Rules are entries in DTensor's table of handlers (torch 2.11-2.15 keep it in the private
`DTensor._op_dispatcher`); plain tensors never reach them.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dtcp.distributed.collectives import axis_group_name

SEQ, HEADS = 1, 2  # dims of [B, L, H, D], and of lse [B, L, H]


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


def _local(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tree_map_only(DTensor, lambda x: x._local_tensor, args)


def _wrap(local: Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False)
