"""Errors of results as norms relative to the truth's, and whether they are within a bound."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor


def relative_error(ours: Tensor, right: Tensor, *, least: float = 1e-9) -> float:
    """Norm of the difference over that of the truth, which counts as `least` at least."""
    ours, right = ours.detach().double(), right.detach().double()
    return float((ours - right).norm() / right.norm().clamp(min=least))


def errors_by_name(
    names: Sequence[str], ours: Sequence[Tensor | None], right: Sequence[Tensor | None]
) -> dict[str, float]:
    """Of each result; what only one of the two has is infinitely wrong."""
    found = {}
    for name, a, b in zip(names, ours, right, strict=True):
        if a is not None and b is not None:
            found[name] = relative_error(a, b)
        elif a is not b:
            found[name] = float("inf")
    return found


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN if any is NaN, which `max` would pass over."""
    errors = list(errors)
    return next((error for error in errors if error != error), max(errors))


def within(errors: Mapping[str, float], bound: float) -> bool:
    """Whether there are any, and each is at most `bound`; NaN is not."""
    return bool(errors) and all(error <= bound for error in errors.values())
