"""Private names of torch: ops, the tensors and modules they work on, and the device."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch._utils import _get_available_device_type
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

OpOverload = torch._ops.OpOverload
"""The type of torch.ops.<namespace>.<name>.default: no public name (2.11-2.15)."""


def overload_of(op: CustomOpDef | OpOverload) -> OpOverload:
    """The op behind a definition: what rules and policies are keyed by (2.11-2.15)."""
    return op._opoverload if isinstance(op, CustomOpDef) else op


def argument_names(op: OpOverload) -> list[str]:
    """Of an op's schema, which has no public reader (2.11-2.15)."""
    return [argument.name for argument in op._schema.arguments]


def packet_of(op: OpOverload) -> Any:
    """All overloads of an op: what torch's registry of FLOPs is keyed by (2.11-2.15)."""
    return op._overloadpacket


def num_results(op: OpOverload) -> int:
    """Of an op's schema, which has no public reader (2.11-2.15)."""
    return len(op._schema.returns)


def storage_key(storage: torch.UntypedStorage) -> int:
    """One number for all views of a piece of memory, fake ones included (2.11-2.15)."""
    return storage._cdata


def changes_of(x: Tensor) -> int:
    """How often a tensor has been written to in place (2.11-2.15)."""
    return x._version


flat_leaves, put_back = tree_flatten, tree_unflatten
"""Nested lists, tuples and dicts, taken apart into leaves and put together (2.11-2.15)."""


@contextmanager
def parameters_replaced(module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a module finds these tensors where it has its own parameters (2.11-2.15)."""
    own = dict(module._parameters)
    module._parameters.update(cast(Any, tensors))
    try:
        yield
    finally:
        module._parameters.update(own)


available_device_type = _get_available_device_type
"""The accelerator of this machine, as torchtitan asks for it; None for a CPU (2.11-2.15)."""
