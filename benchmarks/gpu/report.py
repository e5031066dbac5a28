"""Turn the campaign's lines into a page, and plots where matplotlib is installed."""

import importlib.util
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.run import read_lines, summary
from benchmarks.gpu.speed import HEADS
from benchmarks.report import table
from dtcp.kernels.softmax.backends import BACKENDS


def write_report(results: Path, folder: Path) -> str:
    """Write `gpu_<card>_<yyyymm>.md` and its plot; what was written."""
    lines = [line for path in sorted(results.glob("*.jsonl")) for line in read_lines(path)]
    lines = [line for line in lines if "card" in line]
    if not lines:
        return f"There are no results in {results}: run python -m benchmarks.gpu on a GPU first."
    folder.mkdir(exist_ok=True)
    card = lines[-1]["card"].replace(" ", "_")
    name = f"gpu_{card}_{date.today():%Y%m}"
    text = (
        f"# {lines[-1]['card']}\n\n    python -m benchmarks.gpu\n\ntorch {lines[-1]['torch']}, "
        f"Python {lines[-1]['python']}, {date.today().isoformat()}, heads {HEADS}, bf16\n\n"
        f"{summary(results)}\n"
    )
    written = [folder / f"{name}.md"]
    text += _ranking(read_lines(results / "speed.jsonl"))
    speeds = read_lines(results / "speed.jsonl")
    if speeds and importlib.util.find_spec("matplotlib"):
        written.append(folder / f"{name}.svg")
        _plot(speeds, written[-1])
        text += f"\n![TFLOP/s by length]({written[-1].name})\n"
    written[0].write_text(text)
    return f"wrote {', '.join(str(path) for path in written)}"


def _ranking(lines: list[dict[str, Any]]) -> str:
    """The numbers by which `auto` ranks backends, beside those that are in the table."""
    best: dict[str, float] = {}
    for line in lines:
        name, *rest = line["case"].split()
        if rest[:1] == ["causal"] and "forward_tflops" in line:
            best[name] = max(best.get(name, 0.0), line["forward_tflops"])
    known = {backend.name: backend for backend in BACKENDS if backend.name in best}
    if not known:
        return ""
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    rows = [
        [name, f"{best[name]:.0f}", ", ".join(str(x.speed) for x in backend.on.get(major, ()))]
        for name, backend in sorted(known.items(), key=lambda item: -best[item[0]])
    ]
    head = ("backend", "measured TFLOP/s, causal forward", "in backends.py for this GPU")
    return f"\nWhat `auto` ranks by (dtcp/kernels/softmax/backends.py):\n\n{table(head, rows)}\n"


def _plot(lines: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, key in zip(axes, ("forward_tflops", "backward_tflops"), strict=True):
        by_name: dict[str, list[tuple[int, float]]] = {}
        for line in lines:
            *name, length = line["case"].split()
            if key in line and length.isdigit():
                by_name.setdefault(" ".join(name), []).append((int(length), line[key]))
        for name, points in by_name.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.set(title=key.replace("_", " "), xscale="log", xlabel="tokens", ylabel="TFLOP/s")
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
