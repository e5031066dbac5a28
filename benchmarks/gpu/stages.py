"""The stages of the campaign, in order of what they are worth, each within its own time."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu import kernels, memory, other_kernels, overlap, ranks, shared, speed
from benchmarks.gpu.problems import Case


@dataclass(frozen=True)
class Stage:
    """A question to the card.

    Args:
        seconds: after which no further case is started.
        cases: for a device, the most valuable first.
    """

    name: str
    question: str
    seconds: float
    cases: Callable[[str], list[Case]]


STAGES = (
    Stage("kernels", "Is every backend right, forward and backward?", 110, kernels.cases),
    Stage("others", "Are the kernels of other mixers right?", 30, other_kernels.cases),
    Stage("shared", "Are ranks that share the card one device?", 70, shared.cases),
    Stage("strategies", "Do all ranks of a strategy come to one device?", 40, ranks.right_cases),
    Stage("speed", "How many TFLOP/s, and what does the wrapper cost?", 110, speed.cases),
    Stage("ranks", "How even is the work of 8 and 64 ranks?", 60, ranks.balance_cases),
    Stage("overlap", "Do transfers run beside what is computed?", 30, overlap.cases),
    Stage("memory", "Does a rank hold what the planner forecasts?", 20, memory.cases),
)
"""470 seconds in all; imports and the last case of each stage take the rest of 8 minutes."""
