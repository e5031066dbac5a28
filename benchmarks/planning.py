"""What a batch costs on the host: all of `shard_batch`, for the mixers of a real Gemma 4.

    python -m benchmarks.planning
    python -m benchmarks.planning --profile 8

One process plays a rank of 8, 64 and 512 (nothing is sent, so what other ranks take is not in it).
The model is Gemma 4 31B, all 60 layers of it, without its weights: windows, and global layers whose
keys are made of values. Rows of 256 documents, of 512K tokens and of four times as many, of text
alone and with images, whose tokens see each other inside windows; CPU time of the process on one
thread, the least of many: a busy machine changes it little.
"""

import argparse
import cProfile
import itertools
import json
import pstats
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import dtcp.planner
from benchmarks.report import conditions, publish, table
from dtcp._torch.fakes import fake_ranks
from dtcp.batch import shard_batch
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.labels import shift_labels
from dtcp.mixer_plan import apply_plan
from dtcp.models.gemma4 import Gemma4, config_from_hf
from dtcp.parallelize.plans.gemma4 import gemma4_context_plan
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail, SequenceLayout
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import AllGatherAttention, RingAttention
from dtcp.softmax.style import AttentionStyle

RANKS = (8, 64, 512)
DOCUMENTS = 256
SEQ_LEN = 2**19
LAYOUTS = (DocumentBalanced, HeadTail, BlockBalanced, PerDocument)


def packed_row(seq_len: int, count: int = DOCUMENTS) -> Documents:
    """So many documents of log-normal lengths, which fill a row."""
    drawn = np.random.default_rng(1).lognormal(0, 1.2, count)
    ends = np.rint(np.cumsum(drawn) * seq_len / drawn.sum()).astype(int)
    lengths = np.maximum(1, np.diff(ends, prepend=0))
    lengths[lengths.argmax()] += seq_len - lengths.sum()
    return Documents((tuple(lengths.tolist()),), seq_len)


def batch_of(documents: Documents, *, images: bool) -> dict[str, Tensor]:
    """A row as a loader gives it; with an image of 256 tokens in every eighth document."""
    ids = torch.randint(1000, (1, documents.seq_len))
    batch = {"input_ids": ids, "labels": shift_labels(ids, documents)}
    batch["position_ids"] = documents.position_ids()
    if not images:
        return batch
    kinds = torch.zeros_like(ids)
    start = 0
    for index, length in enumerate(documents.lengths[0]):
        if index % 8 == 0 and length > 300:
            kinds[0, start + 20 : start + 276] = 1
        start += length
    return batch | {"mm_token_type_ids": kinds}


@contextmanager
def model_on(
    ranks: int, style: AttentionStyle, *, images: bool
) -> Iterator[tuple[nn.Module, ParallelMesh]]:
    """Gemma 4 31B, or its text model, on one of so many ranks."""
    folder = Path(dtcp.planner.__file__).parent / "presets"
    config = config_from_hf(json.loads((folder / "gemma4-31b.json").read_text()))
    config = replace(config, vision_blocks=images)
    with fake_ranks(ranks, ranks // 2):
        mesh = ParallelMesh.from_degrees(Degrees(cp=ranks), "cpu")
        with torch.device("meta"):
            model = Gemma4(config)
        assert mesh.cp is not None
        apply_plan(model, mesh.cp, gemma4_context_plan(config, style))
        yield model, mesh


def planning(
    model: nn.Module,
    mesh: ParallelMesh,
    documents: Documents,
    layout: type[SequenceLayout],
    *,
    images: bool,
) -> Callable[[], object]:
    """All that a batch takes on the host."""
    batch = batch_of(documents, images=images)
    return lambda: shard_batch(batch, mesh, layout, model=model, documents=documents)


def least_ms(work: Callable[[], object], repeats: int) -> float:
    """CPU time of the process."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def measured(repeats: int) -> list[list[str]]:
    """Rows of the table."""
    styles: Sequence[AttentionStyle] = (AllGatherAttention(), RingAttention())
    times_of: dict[tuple[str, ...], list[str]] = {}
    for style, images, ranks in itertools.product(styles, (False, True), RANKS):
        with model_on(ranks, style, images=images) as (model, mesh):
            for layout, seq_len in itertools.product(LAYOUTS, (SEQ_LEN, 4 * SEQ_LEN)):
                work = planning(model, mesh, packed_row(seq_len), layout, images=images)
                what = "text and images" if images else "text"
                key = what, layout.__name__, type(style).__name__, f"{seq_len // 1024}K"
                times_of.setdefault(key, []).append(f"{least_ms(work, repeats):.1f}")
    return [[*key, *times] for key, times in sorted(times_of.items())]


def report(repeats: int) -> str:
    """A section of a report."""
    head = ("rows", "layout", "global layers", "tokens", *(f"{n} ranks" for n in RANKS))
    return (
        f"## Planning, ms of CPU\n\n`shard_batch` of a row of {DOCUMENTS} documents for Gemma 4 "
        f"31B, all but what other ranks take to answer; least of {repeats}.\n\n"
        f"{table(head, measured(repeats))}"
    )


def profile(ranks: int, repeats: int) -> None:
    """Where the time goes."""
    with model_on(ranks, AllGatherAttention(), images=True) as (model, mesh):
        work = planning(model, mesh, packed_row(SEQ_LEN), DocumentBalanced, images=True)
        print(f"{least_ms(work, repeats):.2f} ms on {ranks} ranks")
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(repeats):
            work()
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(45)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--profile", type=int, default=0, help="on so many ranks, and no table")
    parser.add_argument("--write", default="", help="hardware name of the file under results/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.profile:
        profile(args.profile, args.repeats)
        return
    head = conditions("benchmarks.planning", {"repeats": args.repeats})
    text = f"{head}\n\n{report(args.repeats)}\n"
    publish("planning", args.write, text)


if __name__ == "__main__":
    main()
