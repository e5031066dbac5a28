"""Scaling runs: the commands to start, and what is planned of each."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from dtcp.distributed.mesh import Degrees
from dtcp.plan.source import Request, asked_documents
from dtcp.planner.cluster import Cluster
from dtcp.planner.search import Candidate, Planner, Wish
from dtcp.planner.setup import Setup
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
    if not request.command:
        raise ValueError("A sweep runs configs of train.py, got no --config: name one.")
    folder.mkdir(parents=True, exist_ok=True)
    commands, runs = [], {}
    for point in points:
        found = _planned(request, cluster, asked_documents(documents, point.seq_len), point.ranks)
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
        given += " --dtcp.forecast"
        nodes = -(-point.ranks // cluster.per_node)
        launcher = f"torchrun --nproc-per-node {min(point.ranks, cluster.per_node)}"
        if nodes > 1:
            launcher = f"srun --nodes {nodes} --ntasks-per-node 1 {launcher} --nnodes {nodes} "
            launcher += '--rdzv-backend c10d --rdzv-endpoint "$HEAD_NODE:29500"'
        commands.append(f"{launcher} {request.command} {given}")
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


def _planned(request: Request, cluster: Cluster, documents: Documents, ranks: int) -> Candidate:
    wish = Wish(documents, 1, request.wish.precision)
    setup = Setup(
        Degrees(cp=ranks),
        documents,
        checkpoint=request.checkpoint,
        precision=wish.precision,
    )
    return Planner(request.subject, cluster, wish).candidate(setup)
