"""Scaling runs: the commands to start, and what is planned of each."""

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
from dtcp.sequence.documents import Documents

PLAN, RUNS = "plan.json", "runs.sh"


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
    request: Request,
    cluster: Cluster,
    points: Sequence[SweepPoint],
    folder: Path,
    *,
    steps: int,
    documents: str = "single",
) -> list[str]:
    """Write the commands and what is planned of each; returns the commands.

    Args:
        documents: of the planned rows, as `--documents` has them.
    Raises:
        ValueError: a model without a config of train.py, or a point that it does not take.
    """
    if not request.script:
        raise ValueError("A sweep runs configs of train.py, got no --config: name one.")
    folder.mkdir(parents=True, exist_ok=True)
    commands, runs = [], {}
    for point in points:
        row, used = asked_documents(documents, point.seq_len), replace(cluster, gpus=point.ranks)
        found = _planned(request, used, row)
        options = {
            "training.steps": steps,
            "dump_folder": folder / point.name,
            "dtcp.forecast": True,
            **train_options(found.setup, used, rows=1),
        }
        launcher = f"torchrun --nproc-per-node {used.ranks_per_node}"
        if used.nodes > 1:
            nodes = f"--nodes {used.nodes} --ntasks-per-node 1"
            launcher = f"srun {nodes} {launcher} --nnodes {used.nodes} "
            launcher += '--rdzv-backend c10d --rdzv-endpoint "$HEAD_NODE:29500"'
        commands.append(f"{launcher} {script_line(request, options)}")
        runs[point.name] = _numbers(point, found)
    (folder / RUNS).write_text("\n".join(["set -e", *commands]) + "\n")
    plan = {
        "model": request.subject.name,
        "documents": documents,
        "cluster": asdict(cluster),
        "runs": runs,
    }
    (folder / PLAN).write_text(json.dumps(plan, indent=1) + "\n")
    return commands


def _numbers(point: SweepPoint, found: Candidate) -> dict[str, Any]:
    """What is planned of a run: of all ranks the tokens, of the busiest one the rest."""
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


def _planned(request: Request, cluster: Cluster, documents: Documents) -> Candidate:
    wish = replace(request.wish, documents=documents, rows=1, checkpoint=request.checkpoint)
    planner = Planner(request.subject, cluster, wish)
    return planner.candidate(planner.plain(Degrees(cp=cluster.gpus)))
