"""Settings of a published checkpoint that a model computes in one way alone."""

from collections.abc import Mapping
from typing import Any


def check_known_settings(
    model: str, settings: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]
) -> None:
    """Refuse a checkpoint that would load, but whose model computes something else.

    Args:
        model: its name, for the error.
        known: for each setting the values that the model computes; the first one where it is not
            said.
    Raises:
        ValueError: another value.
    """
    for name, values in known.items():
        if settings.get(name, values[0]) not in values:
            raise ValueError(
                f"{model} reads {name} in {values}, got {name}={settings[name]}: this checkpoint "
                f"needs a model of its own."
            )
