"""Real steps on packed rows: every layout, and keys that all go to all.

    python -m benchmarks.balance_steps
    python -m benchmarks.balance_steps --write cpu

models.llama, small, in fp32, forward and backward, one row of a suite; the cases take turns in one
run, in another order each time. Their losses are held equal: it is the same work. Of each case, the
median of a step by the clock, and the CPU time of the busiest rank, which is what a step takes
where every rank has a core of its own, on a busy machine too. A suite's rows are printed, and
written, as soon as they are there.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.balance_baselines import rows_of
from benchmarks.on_ranks import in_group
from benchmarks.report import conditions, keep, table
from dtcp.batch import shard_batch
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.kernels.softmax.block_ranges import KeyLine, block_ranges_of_parts
from dtcp.kernels.softmax.pieces import pieces_of_parts
from dtcp.labels import shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.models.llama import Llama, tiny
from dtcp.parallelize import llama_plan, parallelize
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.per_document import PerDocument
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
    "steps",
)


class GatherEverything(AllGatherAttention):
    """All keys to all ranks, whatever the mask, as by other libraries' all-gather."""

    def rank_metadata(
        self, layout: SequenceLayout, rank: int, intervals: KeyIntervals
    ) -> KeyExchangeMetadata:
        seq_len = layout.seq_len
        none = torch.zeros(1, seq_len, dtype=torch.int32)
        every = super().rank_metadata(layout, rank, KeyIntervals.read_off(none, none + seq_len - 1))
        rows = [SlotRuns.of(runs, layout.partition, rank) for runs in intervals.runs]
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


LAYOUTS = (DocumentBalanced, HeadTail, Contiguous, PerDocument, BlockBalanced)


def cases() -> list[Case]:
    ways = {"ring": RingAttention, "needed keys": AllGatherAttention}
    balanced = [
        Case(f"{layout.__name__}, {name}", layout, style())
        for name, style in ways.items()
        for layout in LAYOUTS
    ]
    return [*balanced, Case("HeadTail, everything gathered", HeadTail, GatherEverything())]


class Step:
    """Forward and backward of one case on this rank."""

    def __init__(self, case: Case, mesh: ParallelMesh, documents: Documents) -> None:
        torch.manual_seed(0)
        # Attention is most of it, as in models with long rows.
        config = replace(tiny(vocab_size=64), num_layers=2, hidden_dim=128)
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


Rows = list[list[str]]


def measured(
    ranks: int, tokens_a_rank: int, repeats: int, seconds: float, show: Callable[[Rows], None]
) -> Rows:
    """Rows of the table: every suite and case on so many ranks.

    Args:
        seconds: of a suite, after which its steps are not repeated any more.
        show: called with the rows of each suite.
    """
    rows: Rows = []
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        results = manager.Queue()
        options = (ranks, tokens_a_rank, repeats, seconds, results)
        started = (f"{folder}/meeting", ranks, _rank, *options)
        context = mp.spawn(in_group, started, nprocs=ranks, join=False)
        done = False
        while not done:
            done = context.join(timeout=0.5)
            while not results.empty():
                more = results.get()
                show(more)
                rows += more
    return rows


def _rank(
    rank: int, ranks: int, tokens_a_rank: int, repeats: int, seconds: float, results: Any
) -> None:
    mesh = ParallelMesh.from_degrees(Degrees(cp=ranks), "cpu")
    for suite in SUITES:
        documents = scaled(rows_of(suite, ranks * TOKENS_OF_SUITES, 1)[0], ranks * tokens_a_rank)
        steps = [Step(case, mesh, documents) for case in cases()]
        received = _first_steps(steps, suite)
        _take_turns(steps, repeats, seconds)
        mine = [
            (statistics.median(step.clock), statistics.median(step.cpu), bytes_in)
            for step, bytes_in in zip(steps, received, strict=True)
        ]
        of_ranks: list[Any] = [None] * ranks
        dist.all_gather_object(of_ranks, mine)
        if rank == 0:
            results.put(_rows(suite, of_ranks, len(steps[0].clock)))


def _first_steps(steps: list[Step], suite: str) -> list[int]:
    """One of each case, which is not measured: the bytes that this rank receives in it."""
    losses, received = [], []
    for step in steps:
        with count_traffic() as traffic:
            losses.append(step.run())
        received.append(traffic.received)
        step.clock.clear()
        step.cpu.clear()
    if max(losses) - min(losses) > 1e-5 * max(losses):
        raise SystemExit(f"The cases do the same work, got losses {losses} on {suite}.")
    return received


def _take_turns(steps: list[Step], repeats: int, seconds: float) -> None:
    """A step of each case, again and again: as often on every rank, three times at least."""
    started = time.perf_counter()
    for turn in range(repeats):
        late = torch.tensor([float(time.perf_counter() - started > seconds)])
        dist.all_reduce(late)
        if turn >= 3 and late.item():
            return
        first = 5 * turn % len(steps)
        for step in (*steps[first:], *steps[:first]):
            step.run()


def _rows(suite: str, of_ranks: list[list[tuple[float, float, int]]], turns: int) -> Rows:
    """The table's, of the medians and bytes of each rank."""
    rows = []
    for case, each in zip(cases(), zip(*of_ranks, strict=True), strict=True):
        clock, busiest = max(clock for clock, *_ in each), max(cpu for _, cpu, _ in each)
        received = statistics.fmean(received for *_, received in each) / 1024
        numbers = (f"{clock:.3f}", f"{busiest:.3f}", f"{received:.0f}", str(turns))
        rows.append([suite, str(len(of_ranks)), case.name, *numbers])
    return rows


def scaled(documents: Documents, seq_len: int) -> Documents:
    """A row of the same documents, each as much shorter as the row."""
    ends = np.cumsum(documents.lengths[0]) * seq_len // documents.seq_len
    return Documents((tuple(np.diff(np.unique(ends), prepend=0).tolist()),), seq_len)


def report(
    ranks: tuple[int, ...],
    tokens_a_rank: int,
    repeats: int,
    seconds: float,
    show: Callable[[str], None],
) -> str:
    """A section of the report of `benchmarks.balance`; shown, as far as it is, after each suite."""
    rows: Rows = []
    note = (
        f"## Steps on real ranks\n\nmodels.llama tiny, two narrow layers, fp32, "
        f"{tokens_a_rank} tokens a rank, gloo; medians; the CPU time of the busiest rank is what a "
        f"step takes where each has a core of its own.\n\n"
    )

    def show_more(more: Rows) -> None:
        rows.extend(more)
        show(note + table(HEAD, rows))

    for count in ranks:
        measured(count, tokens_a_rank, repeats, seconds, show_more)
    return note + table(HEAD, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens-a-rank", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=30, help="of a suite's repeated steps")
    parser.add_argument("--write", default="", help="hardware name of the file under results/")
    args = parser.parse_args()
    options = {"tokens-a-rank": args.tokens_a_rank, "repeats": args.repeats}
    head = conditions("benchmarks.balance_steps", options)
    shown = 0

    def show(section: str) -> None:
        nonlocal shown
        lines = section.splitlines()
        print("\n".join(lines[shown:]), flush=True)
        shown = len(lines)
        if args.write:
            text = f"# Steps of packed rows on real ranks\n\n{head}\n\n{section}\n"
            keep("balance_steps", args.write, text)

    print(f"{head}\n", flush=True)
    report(tuple(args.ranks), args.tokens_a_rank, args.repeats, args.seconds, show)


if __name__ == "__main__":
    main()
