"""Tables with the conditions they were measured under."""

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch


def conditions(command: str, options: Mapping[str, Any]) -> str:
    """The command, the software and the machine, in one line each.

    With the load average of the last minute: seconds of a busy machine are not those of a quiet
    one.
    """
    given = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in options.items())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, gloo"
    busy = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return (
        f"    python -m {command} {given}\n\n"
        f"torch {torch.__version__}, Python {platform.python_version()}, {device}, "
        f"one thread a rank, {busy}, {date.today().isoformat()}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def write(folder: Path, name: str, text: str) -> None:
    """Keep a result: `<theme>_<hardware>_<yyyymm>.md`."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}_{date.today():%Y%m}.md").write_text(text)
