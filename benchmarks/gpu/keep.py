"""Keep what was measured where it outlasts the machine, and go on from it on another."""

import gzip
import json
import shutil
from pathlib import Path

from benchmarks.gpu.overlap import TRACE
from benchmarks.gpu.run import append, read_lines

LINES = "gpu_lines.jsonl"


def keep(results: Path, out: Path) -> None:
    """Write the lines of all stages to one file, and a trace beside them, compressed."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [line for path in sorted(results.glob("*.jsonl")) for line in read_lines(path)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    # Whole at any time, also where the run is ended in the middle.
    part = out / f"{LINES}.part"
    part.write_text(text)
    part.replace(out / LINES)
    if TRACE.exists():
        with TRACE.open("rb") as source, gzip.open(out / f"{TRACE.name}.gz", "wb") as target:
            shutil.copyfileobj(source, target)


def resume(kept: Path, results: Path) -> None:
    """Put the lines of a kept file back where they are not.

    Raises:
        ValueError: there is no such file.
    """
    if not kept.is_file():
        raise ValueError(
            f"A campaign goes on from the {LINES} that --out wrote, got {kept}, which is no file: "
            f"name it, or leave --resume out to begin anew."
        )
    results.mkdir(parents=True, exist_ok=True)
    known: dict[str, set[str]] = {}
    for line in read_lines(kept):
        path = results / f"{line['stage']}.jsonl"
        done = known.setdefault(line["stage"], {each["case"] for each in read_lines(path)})
        if line["case"] not in done:
            append(path, line)
            done.add(line["case"])
