"""Scaling runs: the commands to start, and what their logs say beside the plan."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dtcp.distributed.mesh import Degrees
from dtcp.plan.source import Request
from dtcp.planner.cluster import GB, Cluster
from dtcp.planner.search import Candidate, Planner, Wish
from dtcp.planner.setup import Setup
from dtcp.pretrain.plot import read_losses
from dtcp.sequence.documents import Documents

PLAN, RUNS, COLLECTED = "plan.json", "runs.sh", "collected.json"
SKIPPED = 2
"""Steps at the start of a run that compile, and are not measured."""

_TAGS: Mapping[str, str] = {
    "tokens_per_second": "throughput(tokens/s)",
    "seconds": "time_metrics/end_to_end(s)",
    "memory_gib": "memory/max_reserved(GiB)",
    "cp_bytes": "context_parallel/received(bytes)",
}


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep: all its ranks on the axis cp."""

    ranks: int
    seq_len: int

    @property
    def name(self) -> str:
        return f"ranks{self.ranks}_seq{self.seq_len}"


def sweep_points(kind: str, ranks: Sequence[int], seq_len: int) -> list[SweepPoint]:
    """Weak scaling: rows grow with the ranks, from seq_len on one; strong: they stay seq_len."""
    return [SweepPoint(n, seq_len * n if kind == "weak" else seq_len) for n in ranks]


def write_sweep(
    request: Request, cluster: Cluster, points: Sequence[SweepPoint], folder: Path, steps: int
) -> list[str]:
    """Write the commands and what is planned of each; returns the commands.

    Raises:
        ValueError: a model without a config of train.py, or a point that it does not take.
    """
    if not request.command:
        raise ValueError("A sweep runs configs of train.py, got no --config: name one.")
    folder.mkdir(parents=True, exist_ok=True)
    commands, plan = [], {}
    for point in points:
        found = _planned(request, cluster, point)
        options = {
            "training.seq_len": point.seq_len,
            "training.steps": steps,
            "training.local_batch_size": 1,
            "training.global_batch_size": 1,
            "parallelism.data_parallel_shard_degree": 1,
            "parallelism.context_parallel_degree": point.ranks,
            "parallelism.tensor_parallel_degree": 1,
            "dump_folder": str(folder / point.name),
        }
        given = " ".join(f"--{name} {shlex.quote(str(x))}" for name, x in options.items())
        nodes = -(-point.ranks // cluster.per_node)
        launcher = f"torchrun --nproc-per-node {min(point.ranks, cluster.per_node)}"
        if nodes > 1:
            launcher = f"srun --nodes {nodes} --ntasks-per-node 1 {launcher} --nnodes {nodes} "
            launcher += '--rdzv-backend c10d --rdzv-endpoint "$HEAD_NODE:29500"'
        commands.append(f"{launcher} {request.command} {given}")
        plan[point.name] = {
            "ranks": point.ranks,
            "seq_len": point.seq_len,
            "tokens_per_second": found.tokens_per_second,
            "seconds": found.time.total,
            "memory_gib": found.forecast.memory.total / 2**30,
            "cp_bytes": found.forecast.ranks[0].received.total,
            "flops": found.forecast.flops,
            "peak_flops": cluster.flops,
        }
    (folder / RUNS).write_text("\n".join(["set -e", *commands]) + "\n")
    (folder / PLAN).write_text(json.dumps(plan, indent=1) + "\n")
    return commands


def _planned(request: Request, cluster: Cluster, point: SweepPoint) -> Candidate:
    documents = Documents.single(1, point.seq_len)
    wish = Wish(documents, 1, request.wish.precision)
    setup = Setup(
        Degrees(cp=point.ranks),
        documents,
        checkpoint=request.checkpoint,
        precision=wish.precision,
    )
    return Planner(request.subject, cluster, wish).candidate(setup)


def collect(folder: Path) -> list[str]:
    """Read the logs of a sweep's runs, plot them against the plan; returns lines for a person.

    Raises:
        ValueError: no plan in the folder, or no run of it has a log.
    """
    if not (folder / PLAN).is_file():
        raise ValueError(f"A sweep's folder has its {PLAN}, got {folder} without: run --sweep.")
    plan: dict[str, dict[str, Any]] = json.loads((folder / PLAN).read_text())
    found = {name: measured(folder / name) for name in plan}
    found = {name: values for name, values in found.items() if values}
    if not found:
        raise ValueError(
            f"A sweep is collected from its runs' logs, got none in {folder}: run {RUNS} first."
        )
    lines = [f"{'run':<24} {'tokens/s':>10} {'s/step':>8} {'MFU':>7} {'GiB':>7} {'cp/plan':>8}"]
    for name, values in found.items():
        planned = plan[name]
        achieved = planned["flops"] / values["seconds"]
        values["flops_per_second"] = achieved
        values["mfu"] = achieved / planned["peak_flops"]
        ratio = values["cp_bytes"] / planned["cp_bytes"] if planned["cp_bytes"] else 1.0
        values["cp_ratio"] = ratio
        lines.append(
            f"{name:<24} {values['tokens_per_second']:10,.0f} {values['seconds']:8.2f} "
            f"{values['mfu']:7.2%} {values['memory_gib']:7.2f} {ratio:8.3f}"
        )
    rate = median(values["flops_per_second"] for values in found.values())
    lines.append(f"refit: {rate / 1e9:,.1f} GFLOP/s a rank over all compute and waiting")
    written = {"measured": found, "planned": plan, "flops_per_second": rate}
    (folder / COLLECTED).write_text(json.dumps(written, indent=1) + "\n")
    _plot(folder / "collected.png", plan, found)
    return lines


def measured(folder: Path) -> dict[str, float]:
    """Medians over a run's steps, without those that compile; nothing where there is no log."""
    values = {key: list(read_losses(folder, tag).values()) for key, tag in _TAGS.items()}
    values = {key: steps for key, steps in values.items() if steps}
    long_enough = {key: steps[SKIPPED:] or steps for key, steps in values.items()}
    return {key: median(steps) for key, steps in long_enough.items()}


def _plot(path: Path, plan: dict[str, dict[str, Any]], found: dict[str, dict[str, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    shown = {
        "tokens_per_second": ("tokens a second", 1.0),
        "memory_gib": ("GiB a rank at most", 1.0),
        "cp_bytes": ("GB received over cp a step, rank 0", GB),
    }
    for axes, (key, (label, unit)) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        ranks = [plan[name]["ranks"] for name in found]
        axes.plot(ranks, [found[name][key] / unit for name in found], marker="o", label="measured")
        planned = [plan[name][key] / unit for name in found]
        axes.plot(ranks, planned, marker="x", ls="--", label="planned")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(n) for n in ranks])
        axes.set_xlabel("ranks")
        axes.set_ylabel(label)
        axes.legend()
    figure.savefig(path, dpi=110)
