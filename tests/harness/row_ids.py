"""Names of parametrized cases that carry the number of what they stand for."""

from collections.abc import Callable


def of_row(number: str) -> Callable[[object], str]:
    """Ids of cases: `number` and the value; of a function or class its name.

    Alike in every process: several workers that run the suite compare what they collected.
    """
    return lambda value: f"{number}-{getattr(value, '__name__', value)}"
