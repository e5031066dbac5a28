"""What tp splits, it splits into equal parts."""

from collections.abc import Mapping


def check_divisible(sizes: Mapping[str, int], tp: int) -> None:
    """Check that tp divides what a plan splits.

    Args:
        sizes: what the plan splits, by the names of the model's config.
    Raises:
        ValueError: a size that tp does not divide.
    """
    for name, size in sizes.items():
        if size % tp:
            raise ValueError(
                f"Tensor parallelism splits {name} into equal parts, got {name}={size} with "
                f"tp={tp}: choose a tp that divides it, and give the ranks to cp instead."
            )
