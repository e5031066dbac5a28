"""The seam to torch.compile: which code is one graph, which stays eager, and what dynamo made."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from inspect import signature
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from dtcp._torch.compiler import (
    dynamo_limits,
    graph_limit_error,
    graphs_and_breaks,
    graphs_made,
    traced_with,
)
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


def graph_limit() -> int:
    """Graphs of one function that are allowed where nobody says: dynamo's limit if higher."""
    return max(GRAPHS_PER_FUNCTION, dynamo_limits()[0])


def compile_whole(
    function: Callable[P, R],
    *,
    backend: str,
    max_graphs: int | None = None,
    data_sizes: bool = False,
    dynamic: bool = False,
) -> Callable[P, R]:
    """Compile code to one graph, or raise what broke it; sizes are constants of the graph.

    Layers of one model may differ in their sizes, and dynamo would take such a size for one that
    changes from call to call. What does change with every batch is inside our ops.

    Args:
        max_graphs: of this function; None for graph_limit().
        data_sizes: allow ops whose sizes depend on data; a size is then one of no known value.
        dynamic: sizes of inputs are symbols of the graph instead, from the first call on.
    Raises:
        ValueError: when called, sizes that would make one graph more.
    """
    options: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": dynamic}
    limit = graph_limit() if max_graphs is None else max_graphs
    limits = _limits(limit)
    if "recompile_limit" in signature(torch.compile).parameters:
        options["recompile_limit"] = limits.pop("recompile_limit")
    if data_sizes:
        limits |= _CHECKPOINTED_DATA_SIZES
    # Before torch 2.13 the limit is dynamo's, read when a graph is made.
    compiled = torch.compile(function, **options)
    return FewGraphs(traced_with(compiled, limits) if limits else compiled, limit, dynamic=dynamic)


def compile_around_islands(
    function: Callable[P, R],
    *,
    backend: str,
    max_graphs: int | None = None,
    data_sizes: bool = False,
    dynamic: bool = False,
) -> Callable[P, R]:
    """Compile code that holds an eager island: one graph before it and one after.

    However deep in the code the island lies: without nested breaks every module around it breaks
    too, so that each attention breaks twice. The setting is off in torch 2.11 to 2.15.

    Args:
        max_graphs: of this function; None for graph_limit().
        data_sizes: allow ops whose sizes depend on data; a size is then one of no known value.
        dynamic: sizes of inputs are symbols from the first call on, not once they have changed.
    Raises:
        ValueError: when called, sizes that would make one graph more.
    """
    limit = graph_limit() if max_graphs is None else max_graphs
    settings = _limits(limit)
    # Else dynamo would go on in eager mode, without a word.
    settings["fail_on_recompile_limit_hit"] = True
    settings["nested_graph_breaks"] = True
    if data_sizes:
        settings |= _CHECKPOINTED_DATA_SIZES
    compiled = torch.compile(function, backend=backend, dynamic=True if dynamic else None)
    return FewGraphs(traced_with(compiled, settings), limit, dynamic=dynamic)


DATA_SIZES: Mapping[str, Any] = {"capture_dynamic_output_shape_ops": True}
"""Settings of dynamo under which an op whose size depends on data is no break."""


_CHECKPOINTED_DATA_SIZES: Mapping[str, Any] = {
    **DATA_SIZES,
    "skip_fwd_side_effects_in_bwd_under_checkpoint": True,
}
"""These, and that a checkpointed layer may tell its experts of the padding of its call.

It is read in the same call and nowhere else; a graph has it as its input.
"""


def _limits(max_graphs: int) -> dict[str, Any]:
    """Settings of dynamo that allow so many graphs."""
    settings: dict[str, Any] = {"recompile_limit": max_graphs}
    if max_graphs > dynamo_limits()[1]:
        settings["accumulated_recompile_limit"] = max_graphs
    return settings


MANY_SIZES = 8
"""Sizes of one input that are worth a warning: as many graphs as dynamo allows by itself."""


class FewGraphs(Generic[P, R]):
    """Compiled code that says in a sentence when its sizes make more graphs than are allowed.

    Each size costs a compilation, so it warns before: at MANY_SIZES, or half of the limit.
    """

    def __init__(self, compiled: Callable[P, R], max_graphs: int, *, dynamic: bool) -> None:
        self.compiled, self.max_graphs = compiled, max_graphs
        self.remedy = _remedy(dynamic)
        self.sizes: list[tuple[int, ...]] = []

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return self.compiled(*args, **kwargs)
        graphs = graphs_made()
        try:
            result = self.compiled(*args, **kwargs)
        except graph_limit_error():
            raise ValueError(
                f"Compiled code makes a graph for each size of its input and no more than "
                f"max_graphs={self.max_graphs}, got {_size((*args, *kwargs.values()))} after "
                f"{self._seen()}: {self.remedy}; or allow more by Compile(max_graphs=..)."
            ) from None
        if graphs_made() != graphs:
            self._remember(_size((*args, *kwargs.values())))
        return result

    def _remember(self, size: tuple[int, ...]) -> None:
        if size in self.sizes:
            return
        self.sizes.append(size)
        if len(self.sizes) == max(2, min(MANY_SIZES, self.max_graphs // 2)):
            warnings.warn(
                f"Compiled code has made a graph for each of {self._seen()}, which takes as long "
                f"as the first one did, and refuses more than {self.max_graphs} graphs: "
                f"{self.remedy}.",
                stacklevel=3,
            )

    def _seen(self) -> str:
        shown = ", ".join(map(str, self.sizes[-3:]))
        more = ".., " if len(self.sizes) > 3 else ""
        return f"{len(self.sizes)} sizes ({more}{shown})"


def _remedy(dynamic: bool) -> str:
    symbols = ", or make one graph, or one more, for all of them by Compile(dynamic=True);"
    return (
        f"pad batches to few sizes, as shard_batch(.., buckets=Buckets(PowersOfTwo())) does"
        f"{';' if dynamic else symbols} TORCH_LOGS=recompiles says what else differs"
    )


def _size(inputs: Iterable[Any]) -> tuple[int, ...]:
    """The shape of the first tensor, which names the size."""
    first = next((x for x in inputs if isinstance(x, torch.Tensor)), None)
    return () if first is None else tuple(first.shape)


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
