"""A share of what Triton's autotuner tries: other processes compile the rest at the same time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def candidates(part: int, parts: int) -> Iterator[None]:
    """Of every kernel's candidates, let the autotuner try only each `parts`-th, from `part` on.

    What is compiled stays in Triton's cache on the disk, where the process that then tries all of
    them finds it. With more parts than candidates, it tries one.
    """
    try:
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        yield
        return
    prune, used = Autotuner.prune_configs, []

    def share(self: Any, *args: Any) -> list[Any]:
        every = prune(self, *args)
        used.append(self)
        return every[part % len(every) :: parts]

    Autotuner.prune_configs = share
    try:
        yield
    finally:
        Autotuner.prune_configs = prune
        for tuner in used:
            # The best of a share is not the best.
            tuner.cache.clear()
