"""The command line that runs what was planned."""

import shlex
from collections.abc import Mapping
from typing import Any

from dtcp.plan.source import CHECKPOINT, Request
from dtcp.planner.cluster import Cluster
from dtcp.planner.report import checkpoint_name, layout_name, strategy_name
from dtcp.planner.search import Candidate
from dtcp.planner.setup import Setup
from dtcp.softmax import HybridAttention


def command_line(request: Request, best: Candidate, cluster: Cluster) -> str:
    """What runs a setup: train.py for what it takes, else the calls for a script."""
    setup = best.setup
    launcher = f"torchrun --nproc-per-node {cluster.ranks_per_node}"
    if cluster.nodes > 1:
        launcher += f" --nnodes {cluster.nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    if request.script:
        return (
            f"{launcher} {script_line(request, train_options(setup, cluster, request.wish.rows))}"
        )
    given = ", ".join(
        f"{axis}={degree}" for axis, degree in vars(setup.degrees).items() if degree > 1
    )
    nodes = f", ranks_per_node={setup.ranks_per_node}" if setup.ranks_per_node else ""
    calls = (
        f"ParallelMesh.from_degrees(Degrees({given}), 'cuda'{nodes}), {setup.attention!r}, layout "
        f"{setup.layout.__name__}, {setup.checkpoint!r}, {setup.micro_batches} micro-batches of "
        f"{setup.documents.batch}"
    )
    return f"{launcher} YOUR_SCRIPT.py, with {calls}"


def script_line(request: Request, options: Mapping[str, Any]) -> str:
    """train.py with what was given to the planner, and these options in the place of the same.

    Args:
        options: by name; that of checkpointing is a subcommand, and comes last.
    """
    kept = [word for name, words in request.given.items() if name not in options for word in words]
    rest = {name: value for name, value in options.items() if name != CHECKPOINT}
    words = [*request.script, *kept]
    for name, value in rest.items():
        words += [f"--{name}", str(value)] if value is not True else [f"--{name}"]
    if CHECKPOINT in options:
        words.append(f"{CHECKPOINT}:{options[CHECKPOINT]}")
    return " ".join(map(shlex.quote, words))


def train_options(setup: Setup, cluster: Cluster, rows: int) -> dict[str, Any]:
    """The options of train.py that make a run this setup.

    Args:
        rows: of a step, on all ranks together.
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
        "dtcp.strategy": strategy_name(setup).partition("(")[0],
    }
    if isinstance(setup.attention, HybridAttention):
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
