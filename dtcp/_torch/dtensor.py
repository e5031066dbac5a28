"""DTensor: rules for ops, and the shard that a tensor holds."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
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
