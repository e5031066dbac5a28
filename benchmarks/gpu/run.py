"""Run the cases of a stage within its time, and keep a line of JSON for each."""

import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.problems import Case
from benchmarks.gpu.stages import Stage
from benchmarks.report import table


def run_stage(stage: Stage, folder: Path, *, again: bool, device: str = "cuda") -> int:
    """Measure what has no line yet, until the time is over; how many cases were wrong or failed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stage.name}.jsonl"
    if again:
        path.unlink(missing_ok=True)
    done = {line["case"] for line in read_lines(path)}
    cases = [case for case in stage.cases(device) if case.name not in done]
    start, wrong = time.monotonic(), 0
    print(f"{stage.name}: {stage.question} {len(cases)} cases", flush=True)
    for index, case in enumerate(cases):
        if time.monotonic() - start > stage.seconds:
            print(f"  time is over, {len(cases) - index} cases left for another run")
            break
        line = _line(stage, case, device)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        failed = "failed" in line or line.get("right") is False
        wrong += failed
        if failed:
            print(f"  WRONG {json.dumps(line)}", flush=True)
    return wrong


def _line(stage: Stage, case: Case, device: str) -> dict[str, Any]:
    start = time.monotonic()
    # Whatever one kernel does, the next are still measured; an error of CUDA ends the process.
    try:
        result = case.run()
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError) as error:
        result = {"failed": f"{type(error).__name__}: {error}"[:500]}
    if device == "cuda":
        torch.cuda.empty_cache()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "stage": stage.name,
        "case": case.name,
        **result,
        "seconds": round(time.monotonic() - start, 3),
        "card": card,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a stage; none where it has not run."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def summary(folder: Path) -> str:
    """A table per stage of what was measured."""
    texts = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = [line for line in read_lines(path) if "refused" not in line]
        names = list(dict.fromkeys(key for line in lines for key in line if key not in HIDDEN))
        rows = [[_cell(line.get(name)) for name in names] for line in lines]
        if rows:
            texts.append(f"{path.stem}\n\n{table(names, rows)}")
    return "\n\n".join(texts) or "nothing was measured yet"


HIDDEN = ("stage", "seconds", "card", "torch", "python")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value}"
