"""The logs of a sweep's runs beside its plan, and the rates at which they ran."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dtcp.plan.sweep import PLAN, RUNS, SKIPPED
from dtcp.planner.cluster import Cluster
from dtcp.pretrain.plot import read_losses

_TAGS: Mapping[str, str] = {
    "tokens_per_second": "throughput(tokens/s)",
    "seconds": "time_metrics/end_to_end(s)",
    "memory_gib": "memory/max_reserved(GiB)",
    "cp_bytes": "context_parallel/received(bytes)",
    "expected_bytes": "context_parallel/expected(bytes)",
}
_OF_PLAN = (
    *("ranks", "seq_len", "tokens", "tokens_per_second", "seconds", "memory_gib", "cp_bytes"),
    *("fsdp_bytes", "matmul_flops", "mixer_flops", "model_flops"),
)


@dataclass(frozen=True)
class CollectedRun:
    """A run and its plan.

    Args:
        planned: as in the sweep's plan.
        measured: medians over its steps; None where it has not run.
    """

    name: str
    planned: Mapping[str, float]
    measured: Mapping[str, float]


@dataclass(frozen=True)
class Collected:
    """A sweep after its runs.

    Args:
        refitted: the cluster with the rates at which the runs ran.
        documents: of the planned rows, as --documents has them.
        missing: runs without a log.
    """

    model: str
    documents: str
    cluster: Cluster
    refitted: Cluster
    runs: tuple[CollectedRun, ...]
    missing: tuple[str, ...]


def collect(folder: Path) -> Collected:
    """Read the logs of a sweep's runs, and fit its cluster's rates to them.

    Raises:
        ValueError: no plan in the folder, or one that is none; no run of it has a log; a log that
            lacks a number, or has too few steps. Each is named.
    """
    plan = _plan_of(folder)
    runs, missing = [], []
    for name, planned in plan["runs"].items():
        measured = _measured_of(folder / name)
        if measured:
            runs.append(CollectedRun(name, planned, measured))
        else:
            missing.append(name)
    if not runs:
        raise ValueError(
            f"A sweep is collected from its runs' logs, got none in {folder}: run {RUNS} first."
        )
    cluster = Cluster(**plan["cluster"])
    return Collected(
        plan["model"],
        plan["documents"],
        cluster=cluster,
        refitted=refit(cluster, runs),
        runs=tuple(runs),
        missing=tuple(missing),
    )


def _plan_of(folder: Path) -> dict[str, Any]:
    path = folder / PLAN
    if not path.is_file():
        raise ValueError(f"A sweep's folder has its {PLAN}, got {folder} without: run --sweep.")
    try:
        plan: dict[str, Any] = json.loads(path.read_text())
        lacking = [key for key in ("model", "documents", "cluster", "runs") if key not in plan]
        lacking += [
            f"{name}: {key}"
            for name, run in plan["runs"].items()
            for key in _OF_PLAN
            if not isinstance(run.get(key), int | float)
        ]
        lacking += [key.name for key in fields(Cluster) if key.name not in plan["cluster"]]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"A sweep's plan is JSON that --sweep writes, got {path}: {error!r}; run --sweep again."
        ) from None
    if lacking:
        raise ValueError(
            f"A sweep's plan has the numbers of each run, got {path} without {lacking[0]}: run "
            f"--sweep again."
        )
    return plan


def _measured_of(folder: Path) -> dict[str, float]:
    """Medians over a run's steps, without those that compile; nothing where there is no log.

    Raises:
        ValueError: a log that lacks a number, has too few steps, or numbers that are not finite.
    """
    if not list(folder.rglob("events.out.tfevents.*")):
        return {}
    values = {key: list(read_losses(folder, tag).values()) for key, tag in _TAGS.items()}
    if not values["expected_bytes"]:
        # One rank receives nothing, and expects nothing.
        values["expected_bytes"] = [0.0] * len(values["seconds"])
    for key, steps in values.items():
        if not steps:
            raise ValueError(
                f"A run of a sweep logs {_TAGS[key]}, got none in {folder}: its log is cut off, or "
                f"of another command than {RUNS} has; run it again."
            )
        if len(steps) <= SKIPPED:
            raise ValueError(
                f"A run is measured after its first {SKIPPED} steps, which compile, got "
                f"{len(steps)} steps in {folder}: run --sweep with more --steps."
            )
        least = 0.0 if key.endswith("bytes") else 1e-12
        if not all(isfinite(x) and x >= least for x in steps):
            raise ValueError(
                f"A run's log has finite numbers, got {steps} as {_TAGS[key]} in {folder}: run it "
                f"again."
            )
    return {key: median(steps[SKIPPED:]) for key, steps in values.items()}


def refit(cluster: Cluster, runs: Sequence[CollectedRun]) -> Cluster:
    """The rates that fit the runs' seconds best; those that the runs do not show stay as they were.

    A step is taken to be matmuls, then mixers, then transfers, nothing of it at the same time.
    """
    work = np.array(
        [
            [
                run.planned["matmul_flops"],
                run.planned["mixer_flops"],
                run.measured["cp_bytes"] + run.planned["fsdp_bytes"],
            ]
            for run in runs
        ],
        dtype=float,
    )
    seconds = np.array([run.measured["seconds"] for run in runs])
    per_unit = _least_squares(work / seconds[:, None], np.ones(len(runs)))
    rates = {}
    for name, each, unit in zip(
        ("matmul", "mixer", "inside"), per_unit, (cluster.flops, cluster.flops, 1.0), strict=True
    ):
        if each > 0:
            rates[name] = 1 / each / unit
    return replace(cluster, **rates)


def _least_squares(rows: Any, target: Any) -> Any:
    """The solution of least residual that has no negative part; a column of zeros gets none."""
    columns = [index for index in range(rows.shape[1]) if rows[:, index].any()]
    best, least = np.zeros(rows.shape[1]), np.inf
    for size in range(1, min(len(columns), len(rows)) + 1):
        for chosen in combinations(columns, size):
            scale = rows[:, chosen].max(axis=0)
            part = np.linalg.lstsq(rows[:, chosen] / scale, target, rcond=None)[0] / scale
            residual = float(np.square(rows[:, chosen] @ part - target).sum())
            if (part > 0).all() and residual < least * (1 - 1e-9):
                best, least = np.zeros(rows.shape[1]), residual
                best[list(chosen)] = part
    return best


def mfu(run: CollectedRun, cluster: Cluster) -> float:
    """The share of a rank's FLOP/s that went into the model."""
    return run.planned["model_flops"] / run.measured["seconds"] / cluster.flops


def _bytes_ratio(run: CollectedRun) -> float:
    """Bytes counted over those that the batches of the run were expected to move."""
    expected = run.measured["expected_bytes"]
    return run.measured["cp_bytes"] / expected if expected else 1.0


def refitted_seconds(run: CollectedRun, cluster: Cluster) -> float:
    """The modelled seconds of a step at the cluster's rates, nothing of it overlapped."""
    planned = run.planned
    compute = planned["matmul_flops"] / cluster.matmul + planned["mixer_flops"] / cluster.mixer
    moved = run.measured["cp_bytes"] + planned["fsdp_bytes"]
    return compute / cluster.flops + moved / cluster.inside


def collected_lines(found: Collected) -> list[str]:
    """A table of the runs, and the rates."""
    lines = [
        f"{'run':<20} {'tokens/s':>9} {'planned':>9} {'s/step':>7} {'refit':>7} {'MFU':>6} "
        f"{'GiB':>6} {'planned':>8} {'MB for cp':>10} {'of expected':>12}"
    ]
    for run in found.runs:
        measured, planned = run.measured, run.planned
        lines.append(
            f"{run.name:<20} {measured['tokens_per_second']:9,.0f} "
            f"{planned['tokens_per_second']:9,.0f} {measured['seconds']:7.2f} "
            f"{refitted_seconds(run, found.refitted):7.2f} {mfu(run, found.cluster):6.1%} "
            f"{measured['memory_gib']:6.2f} {planned['memory_gib']:8.2f} "
            f"{measured['cp_bytes'] / 1e6:10.2f} {_bytes_ratio(run):12.3f}"
        )
    lines += [f"{name:<20} has no log" for name in found.missing]
    before, after = found.cluster, found.refitted
    rates = ", ".join(
        f"{name} {getattr(before, name):.3g} -> {getattr(after, name):.3g}"
        for name in ("matmul", "mixer", "inside")
    )
    return [*lines, f"rates, as planned -> refitted: {rates}"]
