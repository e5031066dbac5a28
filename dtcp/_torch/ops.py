"""Ops: what a definition, an overload and its schema say of themselves."""

from functools import cache
from typing import Any

import torch
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

OpOverload = torch._ops.OpOverload
"""The type of torch.ops.<namespace>.<name>.default: no public name (2.11-2.15)."""


def overload_of(op: CustomOpDef | OpOverload) -> OpOverload:
    """The op behind a definition: what rules and policies are keyed by (2.11-2.15)."""
    return op._opoverload if isinstance(op, CustomOpDef) else op


def packet_of(op: OpOverload) -> Any:
    """All overloads of an op: what torch's registry of FLOPs is keyed by (2.11-2.15)."""
    return op._overloadpacket


def namespace_of(func: Any) -> str:
    """Of torch.ops.<namespace>.<name>, which has no public type; empty of others (2.11-2.15)."""
    if isinstance(func, torch._ops.OpOverloadPacket):
        return func._qualified_op_name.partition("::")[0]
    return func.namespace if isinstance(func, OpOverload) else ""


@cache
def argument_names(op: OpOverload) -> tuple[str, ...]:
    """Of an op's schema, which has no public reader (2.11-2.15); it makes its arguments anew."""
    return tuple(argument.name for argument in op._schema.arguments)


def num_results(op: OpOverload) -> int:
    """Of an op's schema, which has no public reader (2.11-2.15)."""
    return len(op._schema.returns)


no_autocast = torch._C._DisableAutocast
"""Inside, no device casts; torch's public context is of one device, and slower (2.11-2.15)."""
