"""The boundary between compiled code and collectives, and what is known of compiled graphs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from dtcp.traffic import LEDGER

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


def compile_around_islands(function: Callable[P, R], *, backend: str) -> Callable[P, R]:
    """Compile code that holds an eager island: one graph before it and one after.

    However deep in the code the island lies: without nested breaks every module around it breaks
    too, two breaks an attention. The option is new in torch 2.13, and off there.
    """
    compiled = torch.compile(function, backend=backend)
    if not hasattr(torch._dynamo.config, "nested_graph_breaks"):
        return compiled

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._dynamo.config.patch(nested_graph_breaks=True):
            return compiled(*args, **kwargs)

    return run


def communicated_ops() -> list[torch._ops.OpOverload]:
    """The forward ops whose results came over the network: what a selective policy saves.

    Saving them is what keeps recomputation from communicating a second time.
    """
    # torch has no public list of a namespace's ops (2.11-2.15).
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dtcp::"))
    short = {name.removeprefix("dtcp::").partition(".")[0] for name in names}
    return [
        getattr(torch.ops.dtcp, name).default
        for name in sorted(short)
        if not name.endswith("_backward")
    ]


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
