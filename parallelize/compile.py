"""How blocks are compiled."""

from dataclasses import dataclass

from dtcp.compile import compile_around_islands, compile_whole
from dtcp.parallelize.activation_checkpoint import Forward


@dataclass(frozen=True)
class Compile:
    """Compile each block on its own: equal blocks share one graph, so depth costs no time.

    Only `forward` is compiled, not the module's call: hooks that FSDP adds later run outside of
    the graph, and the module keeps its name and class.
    """

    backend: str = "inductor"

    def whole(self, forward: Forward) -> Forward:
        """Compile to one graph, or raise an error that says what broke it."""
        return compile_whole(forward, backend=self.backend)

    def around_islands(self, forward: Forward) -> Forward:
        """Compile to one graph before an eager island and one after, however deep it lies."""
        return compile_around_islands(forward, backend=self.backend)
