"""Tables with the conditions they were measured under."""

import os
import platform
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def conditions(command: str, options: Mapping[str, Any], without: Collection[str] = ()) -> str:
    """The command, the software and the machine, in one line each.

    With the load average of the last minute: seconds of a busy machine are not those of a quiet
    one.

    Args:
        options: of the command; where to write is left out, and what else is named in `without`.
    """
    left_out = {*without, "write"}
    shown = {key: value for key, value in options.items() if key not in left_out}
    words = " ".join(f"--{key.replace('_', '-')} {_words(value)}" for key, value in shown.items())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, gloo"
    busy = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return (
        f"    python -m {command} {words}\n\n"
        f"torch {torch.__version__}, Python {platform.python_version()}, {device}, "
        f"one thread a rank, {busy}, {date.today().isoformat()}"
    )


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def publish(theme: str, hardware: str, text: str) -> None:
    """Print a result; keep it, too, where its hardware has a name."""
    print(text)
    if hardware:
        keep(theme, hardware, text)


def keep(theme: str, hardware: str, text: str) -> None:
    """Write a result to `results/<theme>_<hardware>_<yyyymm>.md`."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{theme}_{hardware}_{date.today():%Y%m}.md").write_text(text)
