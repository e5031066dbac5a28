"""A collected sweep as files: numbers, a cluster's file, a picture, a page."""

import html
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dtcp.plan.collect import Collected, CollectedRun, collected_lines, mfu, refitted_seconds
from dtcp.planner.page import STYLE, svg_of

NUMBERS, CLUSTER = "collected.json", "cluster.json"
PICTURE, PAGE = "collected.svg", "collected.html"


def write_collected(folder: Path, found: Collected) -> list[str]:
    """Write everything into the sweep's folder; returns the names of the files."""
    cluster = asdict(found.refitted)
    numbers = {
        "model": found.model,
        "runs": {
            run.name: {"planned": run.planned, "measured": run.measured} for run in found.runs
        },
        "missing": found.missing,
        "refitted": cluster,
    }
    (folder / NUMBERS).write_text(json.dumps(numbers, indent=1) + "\n")
    (folder / CLUSTER).write_text(json.dumps(cluster, indent=1) + "\n")
    svg = svg_of(_figure(found), "collected")
    (folder / PICTURE).write_text(svg)
    (folder / PAGE).write_text(_page(found, svg))
    return [NUMBERS, CLUSTER, PICTURE, PAGE]


Value = Callable[[CollectedRun], float]


def _panels(found: Collected) -> list[tuple[str, str, dict[str, Value]]]:
    """(title, unit, lines by label) of each picture."""

    def measured(key: str, unit: float = 1.0) -> Value:
        return lambda run: run.measured[key] / unit

    def planned(key: str, unit: float = 1.0) -> Value:
        return lambda run: run.planned[key] / unit

    return [
        (
            "Speed",
            "tokens/s of all ranks together",
            {
                "measured": measured("tokens_per_second"),
                "planned": planned("tokens_per_second"),
                "planned, rates refitted": lambda run: (
                    run.planned["tokens"] / refitted_seconds(run, found.refitted)
                ),
            },
        ),
        (
            "Model FLOPs that a rank attains (MFU)",
            "% of its peak",
            {
                "measured": lambda run: 100 * mfu(run, found.cluster),
                "planned": lambda run: (
                    100 * run.planned["model_flops"] / run.planned["seconds"] / found.cluster.flops
                ),
            },
        ),
        (
            "Memory of a rank at its fullest",
            "GiB",
            {"measured": measured("memory_gib"), "planned": planned("memory_gib")},
        ),
        (
            "Received for context parallelism, rank 0",
            "MB per step",
            {
                "measured": measured("cp_bytes", 1e6),
                "expected of the run's own batches": measured("expected_bytes", 1e6),
                f"planned of documents {found.documents}": planned("cp_bytes", 1e6),
            },
        ),
    ]


def _figure(found: Collected) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    runs = sorted(found.runs, key=lambda run: run.planned["ranks"])
    ranks = [int(run.planned["ranks"]) for run in runs]
    for axes, (title, unit, lines) in zip(figure.subplots(2, 2).flat, _panels(found), strict=True):
        for style, (label, value) in zip(("o-", "x--", "+:"), lines.items(), strict=False):
            axes.plot(ranks, [value(run) for run in runs], style, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(n) for n in ranks])
        axes.minorticks_off()
        axes.set(xlabel="ranks", ylabel=unit, title=title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def _page(found: Collected, svg: str) -> str:
    title = f"Scaling runs: {html.escape(found.model)}"
    lengths = ", ".join(
        f"{run.planned['ranks']} x {run.planned['seq_len']:,}" for run in found.runs
    )
    table = html.escape("\n".join(collected_lines(found)))
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
        f"<p>Training runs on different numbers of ranks, all of them on one row of tokens "
        f"(ranks x tokens: {lengths}), beside what was planned of each before it ran. Medians over "
        f"the steps of a run, without the first ones, which compile.</p>"
        f"<figure>{svg}<figcaption>Measured and planned. Where the plan of the speed was off, its "
        f"rates were: the third line has those that come nearest to all runs. On CPUs memory is "
        f"that of the whole process, Python and torch included; the plan counts tensors."
        f"</figcaption></figure><h2>All numbers</h2><pre>{table}</pre><p>MFU: the FLOPs of the "
        f"model, without recomputation, over seconds and {found.cluster.flops / 1e12:,.3g} TFLOP/s "
        f"a rank. <i>refit</i>: seconds at the refitted rates, which are in {CLUSTER}, a file for "
        f"<code>--cluster</code>. <i>of expected</i>: bytes counted over those that the run's own "
        f"documents should move.</p></body></html>\n"
    )
