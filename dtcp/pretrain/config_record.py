"""The settings of a run as text: what its checkpoints keep, and what has changed since."""

from collections.abc import Mapping
from typing import Any

LEFT_OUT = ("dump_folder", "checkpoint", "metrics", "profiler", "comm", "debug")
"""Sections that change nothing of what is computed."""


def config_record(config: Any) -> dict[str, str]:
    """Every setting of torchtitan's config by its dotted name, as text."""
    record: dict[str, str] = {}
    for key, value in config.to_dict().items():
        if key not in LEFT_OUT:
            _walk(key, value, record)
    return record


def config_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is set differently now, as `name old -> new`."""
    return [
        f"{name} {before.get(name, 'not set')} -> {now.get(name, 'not set')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _walk(name: str, value: Any, found: dict[str, str]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _walk(f"{name}.{key}", inner, found)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            _walk(f"{name}.{number}", inner, found)
    else:
        found[name] = str(value)
