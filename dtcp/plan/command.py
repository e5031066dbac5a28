"""The command line that runs what was planned."""

import shlex
from collections.abc import Mapping
from typing import Any

from dtcp.plan.source import CHECKPOINT, Request
from dtcp.planner.cluster import Cluster
from dtcp.planner.report import checkpoint_name, layout_name, strategy_name
from dtcp.planner.search import Candidate
from dtcp.planner.setup import Setup
from dtcp.planner.subject import HuggingFaceModel
from dtcp.softmax import HybridAttention


def command_lines(
    request: Request, best: Candidate, cluster: Cluster, *, reads_strategy: bool = True
) -> list[str]:
    """What runs a setup: train.py where it takes the model, else a script with these calls.

    Args:
        reads_strategy: whether any mixer of the model is carried out by a strategy of choice.
    """
    setup = best.setup
    launcher = f"torchrun --nproc-per-node {cluster.ranks_per_node}"
    if cluster.nodes > 1:
        launcher += f" --nnodes {cluster.nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    if not request.script.words:
        why = f"  # train.py: {request.script.why_not}" if request.script.why_not else ""
        return [f"{launcher} YOUR_SCRIPT.py{why}", "with", *_calls(request, setup)]
    options = train_options(setup, cluster, request.workload.rows, reads_strategy=reads_strategy)
    lines = [request.script.before] if request.script.before else []
    lines.append(f"{launcher} {script_line(request, options)}")
    return [*lines, *([f"# {request.script.note}"] if request.script.note else [])]


def _calls(request: Request, setup: Setup) -> list[str]:
    """What a script calls, in Python."""
    axes = vars(setup.degrees).items()
    degrees = ", ".join(f"{axis}={degree}" for axis, degree in axes if degree > 1)
    nodes = f", ranks_per_node={setup.ranks_per_node}" if setup.ranks_per_node else ""
    layout, kept = setup.layout.__name__, f"activation_checkpoint={setup.checkpoint!r}"
    rows = setup.documents.batch
    row = f"{rows} row{'s' * (rows > 1)} of a rank, {setup.micro_batches} times per step"
    mesh = f'mesh = ParallelMesh.from_degrees(Degrees({degrees}), "cuda"{nodes})'
    if isinstance(request.subject, HuggingFaceModel):
        return [
            mesh,
            f"parallelize_hf(model, mesh, {setup.attention!r}, {kept})",
            f"local, sharded = shard_hf_batch(rows, mesh, {layout}, model=model)  # {row}",
        ]
    return [
        mesh,
        f"parallelize(model, mesh, your_plan(model, mesh, {setup.attention!r}), {kept})",
        f"local, sharded = shard_batch(rows, mesh, {layout}, model=model)  # {row}",
    ]


def script_line(request: Request, options: Mapping[str, Any]) -> str:
    """train.py with what was given to the planner; these options replace those of the same name.

    Args:
        options: by name; checkpointing is a subcommand, and comes last.
    """
    kept = [word for name, words in request.given.items() if name not in options for word in words]
    rest = {name: value for name, value in options.items() if name != CHECKPOINT}
    words = [*request.script.words, *kept]
    for name, value in rest.items():
        words += [f"--{name}", str(value)] if value is not True else [f"--{name}"]
    if CHECKPOINT in options:
        words.append(f"{CHECKPOINT}:{options[CHECKPOINT]}")
    return " ".join(map(shlex.quote, words))


def train_options(
    setup: Setup, cluster: Cluster, rows: int, *, reads_strategy: bool = True
) -> dict[str, Any]:
    """The options of train.py that make a run this setup.

    Args:
        rows: of a step, on all ranks together.
        reads_strategy: as of command_lines; train.py refuses one that nothing reads.
    """
    degrees = setup.degrees
    options: dict[str, Any] = {
        "training.seq_len": setup.documents.seq_len,
        "training.local_batch_size": setup.documents.batch,
        "training.global_batch_size": rows,
        "parallelism.data_parallel_replicate_degree": degrees.dp_replicate,
        "parallelism.data_parallel_shard_degree": degrees.dp_shard,
        "parallelism.context_parallel_degree": degrees.cp,
        "parallelism.tensor_parallel_degree": degrees.tp,
        "dtcp.layout": layout_name(setup),
    }
    if reads_strategy:
        options["dtcp.strategy"] = strategy_name(setup).partition("(")[0]
    if reads_strategy and isinstance(setup.attention, HybridAttention):
        options["dtcp.ulysses_degree"] = setup.attention.inner_ranks
    if degrees.ep > 1:
        options["parallelism.expert_parallel_degree"] = degrees.ep
    if degrees.etp > 1:
        options["dtcp.expert_tensor_parallel_degree"] = degrees.etp
    if cluster.nodes > 1 and not setup.ranks_per_node:
        # torchrun would say how many ranks a node has, and they cut cp into unequal parts.
        options["dtcp.ranks_per_node"] = cluster.gpus
    options[CHECKPOINT] = checkpoint_name(setup)
    return options
