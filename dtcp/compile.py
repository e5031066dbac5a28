"""The seam to torch.compile: which code is one graph, which stays eager, and what dynamo made."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch

from dtcp._torch import dynamo_has, graphs_and_breaks, traced_with
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
    by replacing the module's forward, which dynamo guards; hooks added late it does not guard.
    """


Boundary = InGraph | EagerIsland
ISLAND = "dtcp::eager_island"


@cache
def island(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function in eager mode wherever it is called from, and count its executions.

    One function has one island: compiled code guards which function it calls. Not for use as a
    decorator at import, for it brings in dynamo, which takes longer than all of dtcp.
    """

    @torch.compiler.disable(recursive=True)
    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        LEDGER.record(ISLAND)
        return function(*args, **kwargs)

    return run


GRAPHS_PER_FUNCTION = 64
"""Graphs of one function before dynamo gives up, with an error or, at a break, in eager mode.

All blocks of a model are one function to it, and each kind of block has a graph to train and one
to validate: dynamo's own limit of 8 is too low for a model of five kinds."""


def compile_whole(function: Callable[P, R], *, backend: str) -> Callable[P, R]:
    """Compile code to one graph, or raise what broke it; sizes are constants of the graph.

    Layers of one model may differ in their sizes, and dynamo would take such a size for one that
    changes from call to call. What does change with every batch is inside our ops.
    """
    options: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": False}
    limit: dict[str, Any] = {"recompile_limit": GRAPHS_PER_FUNCTION}
    if "recompile_limit" in signature(torch.compile).parameters:
        return torch.compile(function, **options, **limit)
    # Before torch 2.13 the limit is dynamo's, read when a graph is made.
    return traced_with(torch.compile(function, **options), limit)


def compile_around_islands(function: Callable[P, R], *, backend: str) -> Callable[P, R]:
    """Compile code that holds an eager island: one graph before it and one after.

    However deep in the code the island lies: without nested breaks every module around it breaks
    too, so that each attention breaks twice. The setting is new in torch 2.13, and off there.
    """
    settings: dict[str, Any] = {"recompile_limit": GRAPHS_PER_FUNCTION}
    if dynamo_has("nested_graph_breaks"):
        settings["nested_graph_breaks"] = True
    return traced_with(torch.compile(function, backend=backend), settings)


@dataclass
class Graphs:
    """What dynamo did during a stretch of work."""

    graphs: int = 0
    breaks: int = 0


@contextmanager
def count_graphs() -> Iterator[Graphs]:
    """Count the graphs compiled and the graph breaks met inside the block.

    A second graph for the same code is a recompilation.
    """
    counted, (graphs, breaks) = Graphs(), graphs_and_breaks()
    try:
        yield counted
    finally:
        graphs_now, breaks_now = graphs_and_breaks()
        counted.graphs, counted.breaks = graphs_now - graphs, breaks_now - breaks
