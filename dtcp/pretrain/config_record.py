"""The settings of a run as text: what its checkpoints keep, and what has changed since."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LEFT_OUT = ("dump_folder", "checkpoint", "metrics", "profiler", "comm", "debug")
"""Sections that do not change what is computed."""

PLACES = ("folder", "path", "source", "file", "csv", "prefix")
"""Ends of the names of settings that say where something is, not what."""
OF_ONE_RANK = ("metrics.enable_", "metrics.save_for_all_ranks", "profiler.", "debug.print_config")
"""Starts of the names of settings that concern what one rank records, not what ranks compute."""

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""The address of a function, say, which differs between processes."""


def config_record(config: Any) -> dict[str, str]:
    """Every setting of a config that results depend on, by its dotted name, as text."""
    return {
        name: text
        for name, text in _settings(config).items()
        if name.partition(".")[0] not in LEFT_OUT
    }


def settings_of_ranks(config: Any) -> dict[str, str]:
    """Every setting that all ranks of a run must share, by its dotted name, as text."""
    return {
        name: text
        for name, text in _settings(config).items()
        if not name.endswith(PLACES) and not name.startswith(OF_ONE_RANK)
        # The name of a dataset may be a folder.
        if not (name.endswith(".dataset") and Path(text).is_dir())
    }


def _settings(config: Any) -> dict[str, str]:
    record: dict[str, str] = {}
    for key, value in config.to_dict().items():
        _walk(key, value, record)
    return record


def config_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is set differently now, as `name old -> new`."""
    # Checkpoints of earlier versions have addresses in them.
    before = {name: _ADDRESS.sub("", text) for name, text in before.items()}
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
    elif isinstance(value, set | frozenset):
        found[name] = str(sorted(map(str, value)))
    else:
        found[name] = _ADDRESS.sub("", str(value))
