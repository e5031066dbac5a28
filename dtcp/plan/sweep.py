"""Scaling runs: the commands that start them, and what is planned for each."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from dtcp.distributed.mesh import Degrees
from dtcp.plan.command import script_line, train_options
from dtcp.plan.source import Request, asked_documents
from dtcp.planner.cluster import Cluster
from dtcp.planner.search import Candidate, Planner
from dtcp.planner.workload import Workload
from dtcp.sequence.documents import Documents

PLAN, RUNS = "plan.json", "runs.sh"

SKIPPED = 2
"""Steps at the start of a run that compile, and are not measured."""


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep, with all its ranks on the axis cp."""

    ranks: int
    seq_len: int

    @property
    def name(self) -> str:
        return f"ranks{self.ranks}_seq{self.seq_len}"


def sweep_points(kind: str, ranks: Sequence[int], seq_len: int) -> list[SweepPoint]:
    """Weak scaling: rows grow with the ranks, from seq_len on one; strong: they stay seq_len."""
    return [SweepPoint(n, seq_len * n if kind == "weak" else seq_len) for n in ranks]


def write_sweep(
    request: Request,
    cluster: Cluster,
    points: Sequence[SweepPoint],
    folder: Path,
    *,
    steps: int,
    documents: str = "single",
) -> list[str]:
    """Write the commands and what is planned for each; returns the commands.

    Args:
        documents: of the planned rows, as `--documents` has them.
    Raises:
        ValueError: a model that train.py does not take; fewer steps than are measured; a point
            that the model does not take.
    """
    if not request.script.words:
        why = request.script.why_not or "a model of --model is run by a script of one's own"
        raise ValueError(
            f"A sweep runs train.py, got {request.subject.name}, which it does not take ({why}): "
            f"name a --config or another --hf-config."
        )
    if steps <= SKIPPED:
        raise ValueError(
            f"A run of a sweep is measured after its first {SKIPPED} steps, which compile, got "
            f"--steps {steps}: give {SKIPPED + 1} or more."
        )
    commands, runs, head = [], {}, ["set -e"]
    if request.script.before:
        head.append(request.script.before)
    for point in points:
        row, used = asked_documents(documents, point.seq_len), replace(cluster, gpus=point.ranks)
        planner = Planner(request.subject, used, _workload(request, row))
        planner.workload.check_cut(Degrees(cp=point.ranks))
        candidate = planner.candidate(planner.space.plain(Degrees(cp=point.ranks)))
        reads_strategy = planner.row_forecasts.reads_strategy
        options = {
            "training.steps": steps,
            "dump_folder": folder / point.name,
            "dtcp.forecast": True,
            **train_options(candidate.setup, used, rows=1, reads_strategy=reads_strategy),
        }
        commands.append(f"{_launcher(used)} {script_line(request, options)}")
        if used.nodes > 1 and _HEAD_NODE not in head:
            head.append(_HEAD_NODE)
        runs[point.name] = _numbers(point, candidate)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUNS).write_text("\n".join([*head, *commands]) + "\n")
    plan = {
        "model": request.subject.name,
        "documents": documents,
        "cluster": asdict(cluster),
        "runs": runs,
    }
    (folder / PLAN).write_text(json.dumps(plan, indent=1) + "\n")
    return commands


def _numbers(point: SweepPoint, found: Candidate) -> dict[str, Any]:
    """What is planned for a run: the tokens of all ranks, and the rest of the busiest one."""
    forecast, time = found.forecast, found.time
    forward = sum(n for place, n in forecast.matmul_flops.items() if not place.backward)
    mixers = mean(
        sum(each.count * each.forward_flops for each in rank.mixers) for rank in forecast.ranks
    )
    fsdp = forecast.by_axis["fsdp"].total if "fsdp" in forecast.by_axis else 0
    return {
        "ranks": point.ranks,
        "seq_len": point.seq_len,
        "tokens": found.setup.tokens,
        "tokens_per_second": found.tokens_per_second,
        "seconds": time.total,
        "memory_gib": forecast.memory.total / 2**30,
        "cp_bytes": forecast.ranks[0].received.total,
        "fsdp_bytes": fsdp,
        "matmul_flops": sum(forecast.matmul_flops.values()),
        "mixer_flops": forecast.most_mixer_flops,
        # Without recomputation, and with a backward pass of twice the work, as MFU is defined.
        "model_flops": 3 * (forward + mixers),
    }


def _workload(request: Request, documents: Documents) -> Workload:
    """One row a step, with what its config keeps for the backward pass."""
    return replace(request.workload, documents=documents, rows=1, checkpoint=request.checkpoint)


_HEAD_NODE = 'HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
"""Sets where ranks of several nodes meet."""


def _launcher(cluster: Cluster) -> str:
    """What starts train.py on all GPUs of a cluster: torchrun; for several nodes, by SLURM."""
    torchrun = f"torchrun --nproc-per-node {cluster.ranks_per_node}"
    if cluster.nodes == 1:
        return torchrun
    return (
        f"srun --nodes {cluster.nodes} --ntasks-per-node 1 {torchrun} --nnodes {cluster.nodes} "
        f'--rdzv-backend c10d --rdzv-endpoint "$HEAD_NODE:29500"'
    )
