"""A training step of the tiny model on several meshes, side by side.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --seq-len 8192 --backend inductor --write cpu

Per mesh: loss of the first step (equal on all of them), median seconds a step, tokens a second,
bytes received for attention a step (rank 0), graphs compiled and seconds of the first step.
A mesh whose first loss is not one device's is not reported: the run fails.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.on_ranks import measured_on_ranks
from benchmarks.report import conditions, publish, table
from dtcp.batch import shard_batch
from dtcp.compile import count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.labels import shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.models.llama import Llama, tiny
from dtcp.parallelize import Compile, llama_plan, parallelize
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import RingAttention

MESHES = (
    Degrees(),
    Degrees(cp=2),
    Degrees(tp=2),
    Degrees(dp_shard=2),
    Degrees(cp=2, tp=2),
    Degrees(dp_shard=2, cp=2),
    Degrees(cp=4),
)
HEAD = ("mesh", "first loss", "s / step", "tokens / s", "cp KiB / step", "graphs", "first step s")


@dataclass(frozen=True)
class Measured:
    """Rank 0's numbers of one mesh."""

    loss: float
    step: float
    received: int
    graphs: int
    first: float


def main() -> None:
    """Measure every mesh on real ranks and print the table."""
    args = _arguments()
    rows, alone = [], None
    for degrees in MESHES:
        measured = _on_ranks(degrees, args)
        alone = measured.loss if alone is None else alone
        if abs(measured.loss - alone) > 1e-5 * alone:
            raise SystemExit(f"{degrees}: loss {measured.loss} is not one device's, {alone}.")
        rows.append(_row(degrees, measured, args.seq_len * args.rows))
    text = f"{conditions('benchmarks.train_step', vars(args))}\n"
    text += f"models.llama tiny, fp32, ring attention on head-tail shards\n\n{table(HEAD, rows)}\n"
    publish("train_step", args.write, text)


def _on_ranks(degrees: Degrees, args: argparse.Namespace) -> Measured:
    measured: Measured = measured_on_ranks(degrees.world, _rank, degrees, args)[0]
    return measured


def _rank(rank: int, degrees: Degrees, args: argparse.Namespace, results: Any) -> None:
    results[rank] = _measure(ParallelMesh.from_degrees(degrees, "cpu"), args)


def _measure(mesh: ParallelMesh, args: argparse.Namespace) -> Measured:
    step = _training_step(mesh, args)
    with count_graphs() as compiled:
        start = time.perf_counter()
        loss = step()
        first = time.perf_counter() - start
    taken = []
    with count_traffic() as traffic:
        for _ in range(args.repeats):
            dist.barrier()
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    received = traffic.received // args.repeats
    return Measured(loss, statistics.median(taken), received, compiled.graphs, first)


def _training_step(mesh: ParallelMesh, args: argparse.Namespace) -> Callable[[], float]:
    """A function that runs forward and backward on the same global batch on every mesh."""
    torch.manual_seed(0)
    config = tiny()
    model = Llama(config)
    model.init_weights()
    plan = llama_plan(config, mesh, RingAttention())
    parallelize(model, mesh, plan, compile=Compile(args.backend))
    ids = torch.randint(config.vocab_size, (args.rows, args.seq_len))
    lengths = (3 * args.seq_len // 16, 9 * args.seq_len // 16, args.seq_len // 4)
    documents = Documents((lengths,) * args.rows, args.seq_len)
    batch = {"input_ids": ids, "labels": shift_labels(ids, documents)}
    batch["position_ids"] = documents.position_ids()

    share = args.rows // mesh.size("batch")
    own = slice(mesh.rank("batch") * share, (mesh.rank("batch") + 1) * share)
    local, placed = shard_batch(
        {key: x[own] for key, x in batch.items()}, mesh, HeadTail, model=model
    )

    def step() -> float:
        tokens = global_token_count(local["labels"], mesh.loss)
        logits = model(local["input_ids"], local["position_ids"], placed.attn_metadata)
        loss = token_mean_loss(logits, local["labels"], tokens)
        loss.backward()
        model.zero_grad()
        whole = loss.detach().clone()
        if mesh.loss is not None:
            dist.all_reduce(whole, group=mesh.loss.get_group())
        return float(whole)

    return step


def _row(degrees: Degrees, measured: Measured, tokens: int) -> list[str]:
    names = [f"{name} {size}" for name, size in vars(degrees).items() if size > 1]
    return [
        " x ".join(names) or "one device",
        f"{measured.loss:.6f}",
        f"{measured.step:.3f}",
        f"{tokens / measured.step:.0f}",
        f"{measured.received / 1024:.0f}",
        f"{measured.graphs}",
        f"{measured.first:.1f}",
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--backend", default="aot_eager")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", default="", help="hardware name of the file under results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
