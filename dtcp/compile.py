"""The boundary between compiled code and collectives, and what is known of compiled graphs."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dtcp.distributed.ledger import LEDGER

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class InGraph:
    """The mixer stays inside the compiled block, as one op: fullgraph, no break.

    Every rank traces the same graph. The op counts its executions, also under inductor.
    """


@dataclass(frozen=True)
class EagerIsland:
    """The mixer runs in eager mode between two compiled halves of its block: one break.

    For what cannot be traced: third-party kernels, unmodified modules, hooks. The break is made
    by replacing the module's forward, which dynamo guards; hooks added late it does not.
    """


Boundary = InGraph | EagerIsland
ISLAND = "dtcp::eager_island"


def island(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function in eager mode wherever it is called from, and count its executions."""

    @torch.compiler.disable(recursive=True)
    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        LEDGER.record(ISLAND)
        return function(*args, **kwargs)

    return run


def compile_whole(function: Callable[P, R], *, backend: str) -> Callable[P, R]:
    """Compile code to one graph, or raise what broke it; sizes are fixed in the graph.

    Layers of one model may differ in their sizes, and dynamo would take such a size for one that
    changes from call to call. What does change with every batch is inside of our ops.
    """
    how: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": False}
    limit: dict[str, Any] = {"recompile_limit": GRAPHS_A_FUNCTION}
    if "recompile_limit" in signature(torch.compile).parameters:
        return torch.compile(function, **how, **limit)
    # Before torch 2.13 the limit is dynamo's, read when a graph is made.
    return _configured(torch.compile(function, **how), **limit)


def compile_around_islands(function: Callable[P, R], *, backend: str) -> Callable[P, R]:
    """Compile code that holds an eager island: one graph before it and one after.

    However deep in the code the island lies: without nested breaks every module around it breaks
    too, two breaks an attention. The option is new in torch 2.13, and off there.
    """
    how: dict[str, Any] = {"recompile_limit": GRAPHS_A_FUNCTION}
    if hasattr(torch._dynamo.config, "nested_graph_breaks"):
        how["nested_graph_breaks"] = True
    return _configured(torch.compile(function, backend=backend), **how)


GRAPHS_A_FUNCTION = 64
"""Graphs of one function before dynamo gives up, with an error or, at a break, in eager mode.

All blocks of a model are one function to it, and each kind of block has a graph to train and one
to validate: its own limit of 8 is too low for a model of five kinds."""


def _configured(compiled: Callable[P, R], **how: Any) -> Callable[P, R]:
    """A compiled function that is traced under these settings of dynamo."""

    @wraps(compiled)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._dynamo.config.patch(**how):
            return compiled(*args, **kwargs)

    return run


def assert_in_graph(condition: Tensor, message: str) -> None:
    """Stop the program when traced code finds the condition false; the host does not wait."""
    # torch has no public spelling of it (2.11-2.15).
    torch._assert_async(condition, message)


def backward_unasked(
    loss: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """`loss.backward(...)` for a function mode that answers it and stays on while it runs.

    torch's own would ask the mode once more. Straight to the engine (private, torch 2.11-2.15).
    """
    if gradient is None and loss.numel() != 1:
        raise ValueError(
            f"A backward pass starts from a scalar or a gradient, got a loss of shape "
            f"{tuple(loss.shape)}: give gradient, or reduce it."
        )
    gradient = torch.ones_like(loss) if gradient is None else gradient
    keep = create_graph if retain_graph is None else retain_graph
    wanted = () if inputs is None else tuple(inputs)
    how = {"allow_unreachable": True, "accumulate_grad": True}
    torch.autograd.graph._engine_run_backward(
        (loss,), (gradient,), keep, create_graph, wanted, **how
    )


SWITCH_GRADIENTS = torch._C._set_grad_enabled
"""What torch.no_grad calls; a function mode sees it (torch 2.11-2.15)."""


@dataclass(frozen=True)
class _RunInside:
    """A function that is always called inside a context."""

    context: AbstractContextManager[Any]
    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.context:
            return self.function(*args, **kwargs)


def recompute_inside(context: AbstractContextManager[Any]) -> None:
    """Let what is checkpointed reentrantly just now be computed again inside a context.

    For a mode that sees gradients switched off: torch's CheckpointFunction does so in forward,
    and in backward calls `ctx.run_function` once more, where nobody would notice that the mode
    is gone. Its frame alone leads to that `ctx` (torch 2.11-2.15).
    """
    ctx = _autograd_function(sys._getframe(1))
    run = getattr(ctx, "run_function", None)
    if ctx is not None and run is not None and not isinstance(run, _RunInside):
        ctx.run_function = _RunInside(context, run)


def is_recomputed_elsewhere() -> bool:
    """Whether this call is inside of an autograd function `recompute_inside` could not reach."""
    ctx = _autograd_function(sys._getframe(1))
    return ctx is not None and not isinstance(getattr(ctx, "run_function", None), _RunInside)


def _autograd_function(frame: FrameType | None) -> Any:
    """The innermost torch.autograd.Function in whose forward the caller is; None outside of any."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, torch._C._FunctionBase):
                return first
        frame = frame.f_back
    return None


def compiled_autograd() -> AbstractContextManager[Any]:
    """Compile backward passes inside, as torchtitan does: by torch's private switch (2.11-2.15)."""
    context: AbstractContextManager[Any] = torch._dynamo.utils.maybe_enable_compiled_autograd(True)
    return context


@dataclass
class Graphs:
    """What dynamo did during a stretch of work."""

    graphs: int = 0
    breaks: int = 0


@contextmanager
def count_graphs() -> Iterator[Graphs]:
    """Count the graphs compiled and the graph breaks met inside the block.

    A second graph for the same code is a recompile.
    """
    counters = torch._dynamo.utils.counters
    found, start_graphs = Graphs(), counters["stats"]["unique_graphs"]
    start_breaks = sum(counters["graph_break"].values())
    try:
        yield found
    finally:
        found.graphs = counters["stats"]["unique_graphs"] - start_graphs
        found.breaks = sum(counters["graph_break"].values()) - start_breaks
