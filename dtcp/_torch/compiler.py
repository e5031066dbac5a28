"""Dynamo, inductor and compiled autograd: settings, errors and counters."""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

_P = ParamSpec("_P")
_R = TypeVar("_R")


def dynamo_error() -> type[Exception]:
    """What dynamo raises where it cannot make a graph: it has no public name (2.11-2.15)."""
    return torch._dynamo.exc.TorchDynamoException


def graph_limit_error() -> type[Exception]:
    """What dynamo raises at its limit of graphs: it has no public name (2.11-2.15)."""
    return torch._dynamo.exc.FailOnRecompileLimitHit


def is_compiled_module(module: nn.Module) -> bool:
    """Whether torch.compile returned it, or its `compile` was called: no public reader (2.11-2.15).

    Nothing is compiled where dynamo was never imported.
    """
    if module._compiled_call_impl is not None:
        return True
    return "torch._dynamo" in sys.modules and isinstance(module, torch._dynamo.OptimizedModule)


def traced_with(compiled: Callable[_P, _R], settings: Mapping[str, Any]) -> Callable[_P, _R]:
    """A compiled function that is traced under these settings of dynamo, read when it runs.

    torch.compile takes some of them as arguments from 2.13 on, others never (2.15).
    """

    @wraps(compiled)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch._dynamo.config.patch(**settings):
            return compiled(*args, **kwargs)

    return run


def dynamo_limits() -> tuple[int, int]:
    """Graphs of one function that dynamo allows now, and graphs for all of its modules (2.11-2.15).

    The first for modules that it guards alike; no public reader.
    """
    config = torch._dynamo.config
    return config.recompile_limit, config.accumulated_recompile_limit


def graphs_made() -> int:
    """Graphs made by this process so far: no public counter (2.11-2.15)."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def graphs_and_breaks() -> tuple[int, int]:
    """Graphs made and graph breaks met by this process: no public counters (2.11-2.15)."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def compiled_autograd() -> AbstractContextManager[Any]:
    """Compile backward passes inside, as torchtitan does: by a private switch (2.11-2.15)."""
    return torch._dynamo.utils.maybe_enable_compiled_autograd(True)


def inductor_compilers() -> list[str]:
    """The C++ compilers that inductor looks for, by name (2.11-2.15)."""
    names = torch._inductor.config.cpp.cxx
    return [name for name in (names if isinstance(names, tuple) else (names,)) if name]


def set_inductor_processes(count: int) -> None:
    """Let inductor compile in so many processes, with 1 in this one.

    It reads the environment when it is imported, which is too late in a forked process (2.11-2.15).
    """
    torch._inductor.config.compile_threads = count


def assert_in_graph(condition: Tensor, message: str) -> None:
    """Stop the program when traced code finds the condition false; the host does not wait.

    An `assert` on a tensor waits in eager mode; this has no public spelling (2.11-2.15).
    """
    torch._assert_async(condition, message)
