"""Limits of time that a busy machine does not break."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field


def slowness() -> float:
    """How many processes want each core, at least 1: by the load of the last minute."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@dataclass
class Patience:
    """A number of seconds of a quiet machine, spent more slowly by as much as it is slower now."""

    seconds: float
    spent: float = 0.0
    _last: float = field(default_factory=lambda: time.monotonic())

    def left(self) -> float:
        """Seconds of a quiet machine that are left; 0 at the end."""
        now = time.monotonic()
        self.spent += (now - self._last) / slowness()
        self._last = now
        return max(0.0, self.seconds - self.spent)


def patience_after(has_begun: Callable[[], bool]) -> type[Patience]:
    """For tests of a limit: no second of it passes before what is to hang has begun."""

    class After(Patience):
        def left(self) -> float:
            if not has_begun():
                self._last = time.monotonic()
                return self.seconds
            return super().left()

    return After
