"""How blocks are compiled."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn
from torch.compiler import list_backends

from dtcp.compile import compile_around_islands, compile_whole
from dtcp.parallelize.activation_checkpoint import Forward
from dtcp.sequence.arguments import check_ints, check_kind
from dtcp.token_dropout import without_scope

_WELL_KNOWN = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class Compile:
    """Compile each block on its own: equal blocks share one graph, so depth costs no time.

    Only `forward` is compiled, not the module's call: hooks that FSDP adds later run outside of
    the graph, and the module keeps its name and class.

    A graph is made for each size of batches, and takes its time: pad them to few sizes
    (dtcp.sequence.buckets.Buckets), or make sizes symbols (dynamic).

    Args:
        backend: of torch.compile.
        max_graphs: of one function, which all blocks of a kind share: its kinds times the sizes of
            batches, and twice that if it is validated too. One more is refused with the sizes seen.
            None: 64, or dynamo's limit (torch._dynamo.config.recompile_limit) where that is higher.
        dynamic: sizes of batches are symbols of a graph for rows of all lengths: it takes longer to
            make, and its code knows no length. Sizes that were equal when torch traced are one
            symbol, and 1 is none: another length, another number of rows, or one row may each make
            one more. False: sizes are constants (around eager islands, until they change).
        data_sizes: allow ops whose sizes depend on data, in one graph for all of them; set by
            `parallelize` for blocks whose experts are on other ranks.
    """

    backend: str = "inductor"
    max_graphs: int | None = None
    dynamic: bool = False
    data_sizes: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_kind("Compile", str, backend=self.backend)
        check_kind("Compile", bool, dynamic=self.dynamic)
        # To ask for the list imports the compiler.
        if self.backend not in _WELL_KNOWN and self.backend not in list_backends(exclude_tags=()):
            raise ValueError(
                f"Blocks are compiled by a backend of torch.compile, got backend={self.backend!r}: "
                f"name one of {', '.join(list_backends(exclude_tags=()))}."
            )
        if self.max_graphs is not None:
            check_ints("Compile", least=1, max_graphs=self.max_graphs)

    def whole(self, forward: Forward) -> Forward:
        """Compile to one graph, or raise an error that says what broke it."""
        return CompiledForward(partial(compile_whole, **self._options()), forward)

    def around_islands(self, forward: Forward) -> Forward:
        """Compile to one graph before an eager island and one after, however deep it lies."""
        return CompiledForward(partial(compile_around_islands, **self._options()), forward)

    def with_data_sizes(self) -> "Compile":
        """The same for a block in which sizes depend on data."""
        return replace(self, data_sizes=True)

    def _options(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "max_graphs": self.max_graphs,
            "dynamic": self.dynamic,
            "data_sizes": self.data_sizes,
        }


def has_compiled_blocks(model: nn.Module) -> bool:
    """Whether a module of a model has a forward that was compiled here."""
    forwards = [without_scope(vars(module).get("forward")) for module in model.modules()]
    # Around eager islands, the checkpoint is around what is compiled.
    inside = [without_scope(f.args[0]) if isinstance(f, partial) else f for f in forwards]
    return any(isinstance(forward, CompiledForward) for forward in inside)


class CompiledForward:
    """A block's forward, compiled; a deep copy of the block compiles its own."""

    def __init__(self, compiler: Callable[[Forward], Forward], forward: Forward) -> None:
        self.compiler, self.forward = compiler, forward
        self.compiled = compiler(forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledForward":
        return CompiledForward(self.compiler, copy.deepcopy(self.forward, memo))
