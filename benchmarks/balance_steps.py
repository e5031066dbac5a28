"""Real steps on packed rows: DocumentBalanced beside HeadTail and beside keys that all go to all.

    python -m benchmarks.balance_steps --ranks 2 4 --tokens-a-rank 1024

models.llama tiny in fp32, forward and backward, one row of a suite; the cases take turns in one
run. Their losses are held equal: it is the same work. Of each case, the median of a step by the
clock, and the CPU time of the busiest rank, which is what a step takes where every rank has a core
of its own, on a busy machine too.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.balance_rivals import rows_of
from benchmarks.report import conditions, table
from dtcp.batch import shard_batch
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.kernels.softmax.block_ranges import KeyLine, block_ranges_of_parts
from dtcp.kernels.softmax.pieces import pieces_of_parts
from dtcp.labels import shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.models.llama import Llama, tiny
from dtcp.parallelize import llama_plan, parallelize
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.interval_runs import Intervals, KeyIntervals
from dtcp.sequence.layout import HeadTail, SequenceLayout
from dtcp.sequence.slot_runs import SlotRuns
from dtcp.softmax import AllGatherAttention, RingAttention
from dtcp.softmax.metadata import KeyExchangeMetadata
from dtcp.softmax.style import AttentionStyle

SUITES = ("lognormal", "mixture", "single")
TOKENS_OF_SUITES = 8192
"""A rank's, of the rows that documents are drawn for; they are made shorter with the row."""
HEAD = (
    "suite",
    "ranks",
    "layout and strategy",
    "s / step",
    "s of the busiest rank",
    "KiB received",
)


class GatherEverything(AllGatherAttention):
    """All keys to all ranks, whatever the mask, as by other libraries' all-gather."""

    def rank_metadata(
        self, layout: SequenceLayout, rank: int, intervals: Intervals
    ) -> KeyExchangeMetadata:
        seq_len = layout.seq_len
        none = torch.zeros(1, seq_len, dtype=torch.int32)
        every = super().rank_metadata(layout, rank, (none, none + seq_len - 1))
        mask = KeyIntervals.read_off(intervals)
        rows = [SlotRuns.of(runs, layout.partition, rank) for runs in mask.rows]
        start = np.zeros(1, dtype=np.int64)
        keys = KeyLine(start, start, start + seq_len, 1)
        ranges = block_ranges_of_parts(rows, keys, tile=self.tile)
        ends = (np.stack(x) for x in zip(*(row.by_slot() for row in rows), strict=True))
        first, last = (torch.from_numpy(x) for x in ends)
        pieces = pieces_of_parts(rows, keys, tiles=ranges.shape[2])
        return replace(every, first_key=first, last_key=last, block_ranges=ranges, pieces=pieces)


class Case(NamedTuple):
    """A way to carry out the same step."""

    name: str
    layout: type[SequenceLayout]
    style: AttentionStyle


def cases() -> list[Case]:
    return [
        Case("DocumentBalanced, ring", DocumentBalanced, RingAttention()),
        Case("HeadTail, ring", HeadTail, RingAttention()),
        Case("DocumentBalanced, needed keys", DocumentBalanced, AllGatherAttention()),
        Case("HeadTail, needed keys", HeadTail, AllGatherAttention()),
        Case("HeadTail, everything gathered", HeadTail, GatherEverything()),
    ]


class Step:
    """Forward and backward of one case on this rank."""

    def __init__(self, case: Case, mesh: ParallelMesh, documents: Documents) -> None:
        torch.manual_seed(0)
        config = tiny()
        self.model, self.mesh = Llama(config), mesh
        self.model.init_weights()
        parallelize(self.model, mesh, llama_plan(config, mesh, case.style), compile=None)
        ids = torch.randint(config.vocab_size, (1, documents.seq_len))
        batch = {"input_ids": ids, "labels": shift_labels(ids, documents)}
        batch["position_ids"] = documents.position_ids()
        options = {"model": self.model, "documents": documents}
        self.local, self.sharded = shard_batch(batch, mesh, case.layout, **options)
        self.clock: list[float] = []
        self.cpu: list[float] = []

    def run(self) -> float:
        local, metadata = self.local, self.sharded.attn_metadata
        dist.barrier()
        started, cpu = time.perf_counter(), time.process_time()
        tokens = global_token_count(local["labels"], self.mesh.loss)
        logits = self.model(local["input_ids"], local["position_ids"], metadata)
        loss = token_mean_loss(logits, local["labels"], tokens)
        loss.backward()
        self.model.zero_grad()
        self.cpu.append(time.process_time() - cpu)
        self.clock.append(time.perf_counter() - started)
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        return float(whole)


def measured(ranks: int, tokens_a_rank: int, repeats: int) -> list[list[str]]:
    """Rows of the table: every suite and case on so many ranks."""
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        results = manager.dict()
        mp.spawn(_rank, (f"{folder}/meeting", ranks, tokens_a_rank, repeats, results), nprocs=ranks)
        found = dict(results)
    rows = []
    for suite in SUITES:
        for number, case in enumerate(cases()):
            each = [found[suite, number, rank] for rank in range(ranks)]
            clock, busiest = each[0][0], max(cpu for _, cpu, _ in each)
            received = statistics.fmean(received for *_, received in each) / 1024
            numbers = (f"{clock:.3f}", f"{busiest:.3f}", f"{received:.0f}")
            rows.append([suite, str(ranks), case.name, *numbers])
    return rows


def _rank(
    rank: int, meeting: str, ranks: int, tokens_a_rank: int, repeats: int, results: Any
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    mesh = ParallelMesh.from_degrees(Degrees(cp=ranks), "cpu")
    for suite in SUITES:
        documents = scaled(rows_of(suite, ranks * TOKENS_OF_SUITES, 1)[0], ranks * tokens_a_rank)
        steps = [Step(case, mesh, documents) for case in cases()]
        losses, received = [], []
        for step in steps:
            with count_traffic() as traffic:
                losses.append(step.run())
            received.append(traffic.received)
            step.clock.clear()
            step.cpu.clear()
        if max(losses) - min(losses) > 1e-5 * max(losses):
            raise SystemExit(f"The cases do the same work, got losses {losses} on {suite}.")
        for _ in range(repeats):
            for step in steps:
                step.run()
        for number, step in enumerate(steps):
            medians = statistics.median(step.clock), statistics.median(step.cpu)
            results[suite, number, rank] = (*medians, received[number])
    dist.destroy_process_group()


def scaled(documents: Documents, seq_len: int) -> Documents:
    """A row of the same documents, each as much shorter as the row."""
    ends = np.cumsum(documents.lengths[0]) * seq_len // documents.seq_len
    return Documents((tuple(np.diff(np.unique(ends), prepend=0).tolist()),), seq_len)


def report(ranks: tuple[int, ...], tokens_a_rank: int, repeats: int) -> str:
    """A section of the report of `benchmarks.balance`."""
    rows = [row for count in ranks for row in measured(count, tokens_a_rank, repeats)]
    return (
        f"## Steps on real ranks\n\nmodels.llama tiny, fp32, {tokens_a_rank} tokens a rank, gloo; "
        f"medians of {repeats}; the CPU time of the busiest rank is what a step takes where each "
        f"has a core of its own.\n\n{table(HEAD, rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens-a-rank", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    options = {"tokens-a-rank": args.tokens_a_rank, "repeats": args.repeats}
    print(conditions("benchmarks.balance_steps", options))
    print(f"\n{report(tuple(args.ranks), args.tokens_a_rank, args.repeats)}")


if __name__ == "__main__":
    main()
