"""Random calls, sound and unsound: each is answered exactly, or refused in a sentence.

A subject is a function of a `Draw`. It draws arguments, calls what it is about, and asserts that
the answer is the one that plain Python or the dense reference gives. What it draws it declares:

- sound arguments have to be answered, exactly;
- odd ones (`draw.odd`) may be refused, and are exact if they are answered;
- bad ones (`draw.bad`) have to be refused.

A refusal is a ValueError, TypeError, KeyError or NotImplementedError that this project raises
itself and that says what it was given. Any other error is raw: it comes from deep inside, and says
nothing to the person whose argument it was.

A case is a subject and a number; both are in the report, and `repeat` runs one again.
"""

import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor

SEED = int(os.environ.get("FUZZ_SEED", "2026"))
"""Of all draws: `FUZZ_SEED=7 make test ARGS=tests/entry_points` draws others."""
REFUSALS = (ValueError, TypeError, KeyError, NotImplementedError)
ROOT = Path(__file__).parents[2]
HOME = tuple(str(ROOT / name) + "/" for name in ("dtcp", "models", "parallelize"))
SHOWN = 12
"""Failures that a report spells out."""

T = TypeVar("T")


class Draw:
    """Draws the arguments of one case, and remembers how sound they are."""

    def __init__(self, seed: str) -> None:
        self.random = Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(32))
        # Half of the cases are sound throughout; in the others a few arguments are not.
        self._spoils = self.random.random() < 0.5
        self.unsound: list[str] = []
        self.is_bad = False

    def integer(self, low: int, high: int) -> int:
        """An int from low up to high, with high."""
        return self.random.randint(low, high)

    def choice(self, values: Sequence[T]) -> T:
        return self.random.choice(values)

    def chance(self, probability: float = 0.5) -> bool:
        return self.random.random() < probability

    def odd(self, name: str, sound: T, *others: Any) -> T:
        """The sound value, or another one that may be refused."""
        return self._or_other(name, sound, others)

    def bad(self, name: str, sound: T, *others: Any) -> T:
        """The sound value, or another one that has to be refused."""
        value = self._or_other(name, sound, others)
        self.is_bad = self.is_bad or value is not sound
        return value

    def may_be_refused(self, why: str) -> None:
        """Say that what was drawn so far does not fit together, so that it may be refused."""
        self.unsound.append(why)

    def lengths(self, seq_len: int) -> tuple[int, ...]:
        """Documents that fit a row; some rows have padding behind them, some nothing else."""
        lengths: list[int] = []
        room = seq_len if self.chance() else self.integer(0, seq_len)
        while room:
            lengths.append(self.choice((1, room, self.integer(1, room))))
            room -= lengths[-1]
        return tuple(lengths)

    def rows(self, count: int, seq_len: int, *, alike: bool = False) -> tuple[tuple[int, ...], ...]:
        """Documents of several rows."""
        if alike:
            return (self.lengths(seq_len),) * count
        return tuple(self.lengths(seq_len) for _ in range(count))

    def ids(self, *shape: int, high: int = 50) -> Tensor:
        return torch.randint(1, high, shape, generator=self.generator)

    def floats(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def _or_other(self, name: str, sound: T, others: Sequence[Any]) -> T:
        if not self._spoils or self.random.random() < 0.7:
            return sound
        self.unsound.append(name)
        other: T = self.random.choice(others)
        return other


Subject = Callable[..., None]


@dataclass
class Tally:
    """What came of the cases."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, verdict: str, report: str) -> None:
        self.counts[verdict] += 1
        if verdict in ("wrong", "raw"):
            self.failures.append(report)

    def merge(self, other: "Tally") -> None:
        self.counts.update(other.counts)
        self.failures += other.failures

    def __str__(self) -> str:
        names = ("answered", "refused", "wrong", "raw")
        counts = ", ".join(f"{self.counts[name]} {name}" for name in names)
        return f"{self.counts.total()} calls: {counts}"

    def check(self) -> None:
        """Print the counts; fail if a case is wrong or raw."""
        print(f"\nseed {SEED}: {self}")
        shown = "\n\n".join(self.failures[:SHOWN])
        assert not self.failures, f"seed {SEED}: {self}\n\n{shown}"


def run_cases(subjects: Sequence[Subject], cases: Iterable[int], *args: Any) -> Tally:
    """Run the cases of these numbers; the subjects take turns."""
    tally = Tally()
    for case in cases:
        subject = subjects[case % len(subjects)]
        tally.add(*run_case(subject, case, *args))
    return tally


def run_case(subject: Subject, case: int, *args: Any) -> tuple[str, str]:
    """The verdict on one case, and what to report of it."""
    draw = Draw(f"{SEED}/{case}")
    try:
        subject(draw, *args)
    except AssertionError as error:
        verdict, text = "wrong", _trace(error)
    # Any error that is no refusal is what the fuzzer looks for: it is counted as raw, with its
    # trace, and one of them fails the test.
    except Exception as error:  # noqa: BLE001
        verdict, text = ("refused" if is_refusal(error) else "raw"), _trace(error)
    else:
        verdict, text = "answered", "it was answered"
    if (verdict == "refused" and not draw.unsound) or (verdict == "answered" and draw.is_bad):
        verdict = "wrong"
    unsound = f", unsound: {', '.join(draw.unsound)}" if draw.unsound else ", sound"
    name = getattr(subject, "__name__", str(subject))
    return verdict, f"{verdict}: {name}, case {case}{unsound}\n{text}"


def repeat(subject: Subject, case: int, *args: Any) -> None:
    """Run one case again, and let its error through: for a debugger."""
    subject(Draw(f"{SEED}/{case}"), *args)


def is_refusal(error: Exception) -> bool:
    """Whether this project raised it by a sentence that names what it was given."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = last.filename.startswith(HOME)
    raised = (last.line or "").startswith("raise ")
    text = str(error.args[0]) if error.args else ""
    # The message of a KeyError begins with the key that is missing.
    names = ": " in text and (isinstance(error, KeyError) or "got " in text)
    return isinstance(error, REFUSALS) and ours and raised and names


def _trace(error: BaseException) -> str:
    """The error, and the last places it went through."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = [f"  {frame.filename}:{frame.lineno} {frame.line}" for frame in frames]
    return "\n".join([f"{type(error).__name__}: {str(error)[:600]}", *places])
