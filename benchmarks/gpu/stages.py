"""The stages of the campaign, in order of what they are worth, each within its own time."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu import kernels, long_rows, memory, other_kernels, overlap, ranks, shared, speed
from benchmarks.gpu.problems import Case


@dataclass(frozen=True)
class Stage:
    """A question to the card.

    Args:
        seconds: after which no further case is started.
        cases: for a device, the most valuable first.
        workers: processes that share the cases. What is right is so beside others, too, and most of
            its time is compilation; what is timed has the card for itself.
    """

    name: str
    question: str
    seconds: float
    cases: Callable[[str], list[Case]]
    workers: int = 1


STAGES = (
    Stage("kernels", "Is every backend right, forward and backward?", 100, kernels.cases, 10),
    Stage("others", "Are the kernels of other mixers right?", 60, other_kernels.cases, 14),
    Stage("shared", "Are ranks that share the card one device?", 75, shared.cases, 8),
    Stage("strategies", "Do all ranks of a strategy come to one device?", 30, ranks.right_cases, 6),
    Stage("speed", "How many TFLOP/s, and what does the wrapper cost?", 100, speed.cases),
    Stage("long", "Are more than 2^31 numbers read to their end?", 25, long_rows.cases),
    Stage("ranks", "How even is the work of 8 and 64 ranks?", 40, ranks.balance_cases),
    Stage("overlap", "Do transfers run beside what is computed?", 30, overlap.cases),
    Stage("memory", "Does a rank hold what the planner forecasts?", 20, memory.cases),
)
"""480 seconds at most; what is right takes less than its time where 16 cores compile it."""
