"""Every private name of torch that dtcp uses, each with the versions it was read in and why."""

import torch
from torch.library import CustomOpDef

OpOverload = torch._ops.OpOverload
"""The type of torch.ops.<namespace>.<name>.default, which has no public name (2.11-2.15)."""


def overload_of(op: CustomOpDef) -> OpOverload:
    """The op that a definition made: what rules and policies are keyed by (2.11-2.15)."""
    return op._opoverload
