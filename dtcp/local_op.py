"""How a function becomes an op of torch, as all of ours do."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.library import CustomOpDef

from dtcp._torch.functorch import forward_mode_open, set_transform_rule, transform_running
from dtcp.autocast import outside_autocast


def local_op(
    name: str, *, schema: str | None = None
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a function an op that moves nothing; its body runs outside of autocast, on the device of
    its first tensor: libraries of kernels launch on the one that is current.

    It has no derivative in forward mode, of which torch would drop its share without a word, and
    takes no part in transforms of torch.func. What `register_autograd` is not called for has none
    in reverse either, and says so when one is asked for.

    Its fake and its derivative read its arguments alone: inductor's cache on the disk knows a graph
    by its text and inputs, groups of 2 and of 4 ranks may have one name, and sizes of results are
    in the code. So a release in which results have other sizes or dtypes, of arguments of the same
    kinds, gives the op another name.

    Args:
        name: dtcp::<name>.
        schema: as of torch.library.custom_op; None reads it off the annotations.
    """

    def refuse(transform: str) -> NoReturn:
        _refuse_transform(name, transform)

    def no_derivative(ctx: Any, *grads: Any) -> NoReturn:
        refuse_derivative(name)

    def make(function: Callable[..., Any]) -> CustomOpDef:
        body = outside_autocast(_without_tangents(name, function))
        # What a body reads of the host, lengths and routes, would stay that of the first batch.
        tags = (torch.Tag.cudagraph_unsafe,)
        op = torch.library.custom_op(name, mutates_args=(), schema=schema, tags=tags)(body)
        set_transform_rule(op, refuse)
        op.register_autograd(no_derivative)
        register = op.register_fake
        op.register_fake = lambda fake: register(  # type: ignore[method-assign]
            _outside_forward_mode(name, fake)
        )
        return op

    return make


def check_differentiation(subject: str, *inputs: Tensor | None) -> None:
    """Refuse what torch.autograd.Function has no rule for: forward mode, transforms of torch.func.

    Args:
        inputs: of the function that this precedes.
    """
    if torch.compiler.is_compiling():
        return
    if transform_running():
        _refuse_transform(subject, "any")
    _check_tangents(subject, inputs)


def refuse_derivative(name: str) -> NoReturn:
    """Of the result of an op that is differentiated once."""
    raise NotImplementedError(
        f"{name} has no derivative of its own, got one asked of its result, as of a backward "
        f"pass with create_graph=True: leave create_graph out, and differentiate once."
    )


def _without_tangents(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The body of an op, on its device; it refuses what forward mode gives a tangent."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _check_tangents(name, args)
        with torch.cuda.device(_device_index(args)):
            return function(*args, **kwargs)

    return run


def _device_index(inputs: Any) -> int:
    """Of the GPU that the first tensor is on; -1, which changes nothing, where it is on none."""
    first = next((x for x in inputs if isinstance(x, Tensor)), None)
    return first.get_device() if first is not None and first.is_cuda else -1


def _outside_forward_mode(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake of an op that stays out of graphs with tangents: these are gone when it is asked.

    What was to be one graph breaks here, and the body looks at each tensor.
    """

    @wraps(fake)
    def run(*args: Any, **kwargs: Any) -> Any:
        if forward_mode_open():
            raise NotImplementedError(
                f"{name} is differentiated in reverse alone, got a trace inside of a dual_level of "
                f"forward mode: compile what is around it, or call it once before."
            )
        return fake(*args, **kwargs)

    return run


def _check_tangents(name: str, inputs: Any) -> None:
    if forward_mode_open() and any(
        isinstance(x, Tensor) and unpack_dual(x).tangent is not None for x in inputs
    ):
        raise NotImplementedError(
            f"{name} is differentiated in reverse alone, got a dual tensor of forward mode: use "
            f"torch.autograd.grad for code around it."
        )


def _refuse_transform(name: str, transform: str) -> NoReturn:
    raise NotImplementedError(
        f"{name} takes no part in transforms of torch.func, got an argument of one ({transform}): "
        f"use torch.autograd.grad for gradients, and the batch's own dim or a loop for vmap."
    )
