"""Transforms of torch.func, as an op meets them (all names 2.11-2.15)."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad
from torch.autograd.forward_ad import unpack_dual
from torch.library import CustomOpDef
from torch.utils._pytree import tree_map_only

_KINDS = torch._C._functorch.TransformType
_NAMES = MappingProxyType(
    {_KINDS.Grad: "grad, vjp or jacrev", _KINDS.Jvp: "jvp or jacfwd", _KINDS.Vmap: "vmap"}
)


def transform_running() -> bool:
    """Whether a transform of torch.func is being carried out: it has no public reader."""
    return bool(torch._C._are_functorch_transforms_active())


def forward_mode_open() -> bool:
    """Whether code runs inside of a forward_ad.dual_level: it has no public reader."""
    return forward_ad._current_level >= 0


def set_transform_rule(op: CustomOpDef, refuse: Callable[[str], None]) -> None:
    """Let an op take no part in transforms: what it is given is constant to each of them.

    By itself torch gives the op's result no tangent under jvp, without a word, and has errors of
    its own for the other transforms. Where none is running, this is never called.

    Args:
        refuse: what raises where an argument is not constant, given the transforms' names.
    """

    def constant(x: Tensor) -> Tensor:
        transform = retrieve_current_functorch_interpreter()
        own = torch._C._functorch
        x = own.unwrap_if_dead(x)
        if unpack_dual(x).tangent is not None:
            refuse(_NAMES[_KINDS.Jvp])
        if own.is_functionaltensor(x):
            torch._sync(x)
            return own._unwrap_functional_tensor(x, True)
        if own.maybe_get_level(x) != transform.level():
            return x
        if transform.key() == _KINDS.Vmap or (x.requires_grad and torch.is_grad_enabled()):
            refuse(_NAMES[transform.key()])
        return own.get_unwrapped(x)

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, constant, (args, kwargs))
        with retrieve_current_functorch_interpreter().lower():
            return op(*args, **kwargs)

    op._lib.impl(op._name, run, "FuncTorchDynamicLayerFrontMode")
