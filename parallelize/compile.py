"""Each block compiled on its own."""

from dataclasses import dataclass
from typing import Any

import torch

from parallelize.activation_checkpoint import Forward


@dataclass(frozen=True)
class Compile:
    """Compile each block on its own: equal blocks share one graph, so depth costs no time.

    `forward` alone is compiled, and not the module's call: hooks that FSDP adds later run
    outside of the graph, and the module keeps its name and class.
    """

    backend: str = "inductor"

    def whole(self, forward: Forward) -> Forward:
        """One graph, or an error that says what broke it."""
        return torch.compile(forward, backend=self.backend, fullgraph=True)

    def around_islands(self, forward: Forward) -> Forward:
        """One graph before an eager island and one after, however deep in the block it lies."""
        compiled = torch.compile(forward, backend=self.backend)

        def run(*args: Any, **kwargs: Any) -> Any:
            # Without it every module around the island breaks too: two breaks an attention,
            # four graphs (torch 2.13, where the option is new and off).
            with torch._dynamo.config.patch(nested_graph_breaks=True):
                return compiled(*args, **kwargs)

        return run
