"""What it costs to hold a batch against itself and against other ranks' before it is cut.

    python -m benchmarks.batch_checks
    python -m benchmarks.batch_checks --write cpu

Host time of a batch of one row: on one process, all that `shard_batch` checks (documents, position
ids, padding and labels against each other); on ranks, that and the comparison of the rows with the
other rank's, exchange included, from a barrier on until the last rank is through. For each way in
which a batch may tell its documents: the least time by the clock, and the median of what the
calling thread computed, which changes less on a busy machine. None of it is part of a model:
`--graph` prints what a compiled block of a Llama calls.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from benchmarks.on_ranks import measured_on_ranks
from benchmarks.report import conditions, publish, table
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.distributed.same_rows import prepared_alike
from dtcp.mixer_metadata import batch_metadata
from dtcp.models.llama import Llama, tiny
from dtcp.rows import DEFAULT_FIELDS, Rows
from dtcp.sequence.documents import Documents

DOCUMENT = 4096
"""Tokens of a document; the last one of the row is shorter, and padding follows."""

MISSING = 96

Batch = tuple[dict[str, Tensor], Documents | None]


def ways_in(seq_len: int) -> Mapping[str, Batch]:
    """One row of packed documents, tokens in every usual way."""
    lengths = [DOCUMENT] * (seq_len // DOCUMENT)
    lengths[-1] -= MISSING
    documents = Documents((tuple(lengths),), seq_len)
    document = documents.document()
    padding = document < 0
    ids = torch.randint(1000, (1, seq_len))
    tokens = {"input_ids": ids, "labels": (ids + 1).masked_fill(padding, -100)}
    placed = tokens | {"position_ids": documents.position_ids()}
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "documents=": (placed, documents),
        "cu_seqlens": (placed | {"cu_seqlens": bounds}, None),
        "position_ids": (placed | {"padding_mask": padding}, None),
        "position_ids, mask of int64": (placed | {"padding_mask": padding.long()}, None),
        "document_ids": (placed | {"document_ids": document, "padding_mask": padding}, None),
        "one document": (tokens | {"padding_mask": padding}, None),
    }


def main() -> None:
    """Measure on one process, then on ranks, and print both."""
    args = _arguments()
    if args.graph:
        print("\n".join(f"{count:>4} {name}" for name, count in sorted(block_calls().items())))
        return
    torch.set_num_threads(1)
    alone = {name: _alone(batch, args.repeats) for name, batch in ways_in(args.seq_len).items()}
    together = measured_on_ranks(args.ranks, _rank, args.ranks, args.seq_len, args.repeats)
    head = ("a batch tells its documents by", "1 process ms", "computed")
    head = (*head, f"{args.ranks} ranks ms", "computed")
    rows = [
        [name, *(f"{x * 1e3:.2f}" for x in (*_summary(alone[name]), *_summary(together[name])))]
        for name in alone
    ]
    text = conditions("benchmarks.batch_checks", vars(args), without=["graph"])
    text += "\n\nHost time of one batch, one row of "
    text += f"{args.seq_len:,} tokens in documents of {DOCUMENT:,}, {MISSING} of padding: the "
    text += f"least of {args.repeats}, and the median of what the thread computed\n\n"
    text += f"{table(head, rows)}\n"
    publish("gates", args.write, text)


Times = list[tuple[float, float]]
"""Seconds by the clock and of the thread, by repeat."""


def _summary(times: Times) -> tuple[float, float]:
    return min(clock for clock, _ in times), statistics.median(own for _, own in times)


def _prepare(batch: Batch) -> Callable[[], Rows]:
    tensors, documents = batch
    return lambda: Rows.of(tensors, DEFAULT_FIELDS, documents)


def _alone(batch: Batch, repeats: int) -> Times:
    prepare = _prepare(batch)
    return [_timed(prepare) for _ in range(repeats)]


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    start, computed = time.perf_counter(), time.thread_time()
    work()
    return time.perf_counter() - start, time.thread_time() - computed


def _rank(rank: int, ranks: int, seq_len: int, repeats: int, results: Any) -> None:
    mesh = ParallelMesh.from_degrees(Degrees(cp=ranks), "cpu")
    torch.manual_seed(0)
    for name, batch in ways_in(seq_len).items():
        prepare, times = _prepare(batch), []
        for _ in range(repeats):
            dist.barrier()
            took = _timed(lambda: prepared_alike((mesh.cp,), prepare, Rows.contents))  # noqa: B023
            slowest = torch.tensor(took)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            times.append(tuple(slowest.tolist()))
        if rank == 0:
            results[name] = times


def block_calls() -> Counter[str]:
    """What a compiled block of a Llama calls, by name."""
    calls: Counter[str] = Counter()

    def keep(graph: fx.GraphModule, _: object) -> Callable[..., Any]:
        calls.update(
            str(getattr(node.target, "__name__", node.target))
            for node in graph.graph.nodes
            if node.op.startswith("call")
        )
        return graph.forward

    model = Llama(tiny())
    model.init_weights()
    documents = Documents.single(1, 64)
    block = model.layers["0"] if hasattr(model.layers, "keys") else model.layers[0]
    block.forward = torch.compile(block.forward, backend=keep, fullgraph=True)
    model(
        torch.zeros(1, 64, dtype=torch.int64),
        documents.position_ids(),
        batch_metadata(model, documents),
    )
    return calls


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=131_072)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--graph", action="store_true", help="print what a compiled block calls")
    parser.add_argument("--write", default="", help="hardware name of the file under results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
