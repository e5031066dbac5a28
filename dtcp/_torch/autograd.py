"""The autograd engine, as a function mode meets it."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

SET_GRAD_ENABLED = torch._C._set_grad_enabled
"""What torch.no_grad calls; a function mode sees it (2.11-2.15)."""


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
