"""What each attention strategy moves, keeps and takes, beside what the maths needs.

    python -m benchmarks.attention
    python -m benchmarks.attention --ranks 4 --seq-len 8192 --write cpu
    python -m benchmarks.attention --device cuda --write h200

Per strategy: bytes rank 0 .. n-1 received at most, counted by the ops, and over the strategy's
own formula; bytes kept for backward over the local inputs, output and lse; median step time over
its ideal share, one device's time for the whole sequence divided by the ranks. Then the time to
compile a block with the strategy over that of the same block without. A case whose result is not
one device's is not reported: the run fails. With --device cuda: what the kernels reach there
instead, on one GPU (attention_kernel.py).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks import attention_kernel
from benchmarks.compile_time import compile_line
from benchmarks.on_ranks import measured_on_ranks
from benchmarks.report import conditions, publish, table
from dtcp.batch import shard_batch
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.masks import Causal, Mask, SlidingWindow
from dtcp.sharded_batch import ShardedBatch
from dtcp.softmax import (
    AllGatherAttention,
    HaloAttention,
    HybridAttention,
    RingAttention,
    UlyssesAttention,
)
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.softmax.moves import AttentionShape
from dtcp.softmax.style import AttentionStyle

WINDOW = 512
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
HEAD = (
    "strategy",
    "layout",
    "mask",
    "fwd KiB",
    "/ formula",
    "bwd KiB",
    "/ formula",
    "kept / local",
    "step / ideal",
)


@dataclass(frozen=True)
class Case:
    """A strategy, the layout and mask it is measured on, and the documents packed in the row."""

    name: str
    style: AttentionStyle
    layout: type[SequenceLayout]
    mask: Mask
    documents: int = 1


@dataclass(frozen=True)
class Measured:
    """One rank's numbers: (forward, backward) bytes, bytes kept, seconds a step."""

    received: tuple[int, int]
    formula: tuple[int, int]
    kept: float
    step: float
    ideal: float


def cases(ranks: int) -> list[Case]:
    """Every strategy where it is at home; packed documents beside whole ones."""
    window = Causal() & SlidingWindow(WINDOW)
    tried = [
        Case("ring", RingAttention(), HeadTail, Causal()),
        Case("ring", RingAttention(), HeadTail, Causal(), documents=8),
        Case("all-gather", AllGatherAttention(), HeadTail, Causal()),
        Case("all-gather", AllGatherAttention(), HeadTail, Causal(), documents=8),
        Case("all-gather", AllGatherAttention(), Contiguous, Causal()),
        Case("Ulysses", UlyssesAttention(), HeadTail, Causal()),
        Case("halo", HaloAttention(WINDOW), Contiguous, window),
        Case("halo", HaloAttention(WINDOW), HeadTail, window),
    ]
    if ranks % 2 == 0 and ranks > 2:
        tried.append(Case("Ulysses x ring", HybridAttention(inner_ranks=2), HeadTail, Causal()))
    return tried


def main() -> None:
    """Measure every case on real ranks and print the table."""
    args = _arguments()
    if args.device != "cpu":
        attention_kernel.main(args.device, args.repeats, args.write)
        return
    measured = measured_on_ranks(args.ranks, _rank, args.ranks, args.seq_len, args.repeats)
    rows = [
        _row(case, [measured[index, rank] for rank in range(args.ranks)])
        for index, case in enumerate(cases(args.ranks))
    ]
    text = f"{conditions('benchmarks.attention', vars(args), without=['device'])}\n"
    text += f"heads {HEADS}, kv heads {KV_HEADS}, head dim {HEAD_DIM}, fp32, window {WINDOW}\n\n"
    text += f"{table(HEAD, rows)}\n\n{compile_line()}\n"
    publish("attention", args.write, text)


def _rank(rank: int, ranks: int, seq_len: int, repeats: int, results: Any) -> None:
    mesh = ParallelMesh.from_degrees(Degrees(cp=ranks), "cpu")
    for index, case in enumerate(cases(ranks)):
        results[index, rank] = _measure(case, mesh, seq_len, repeats)


def _measure(case: Case, mesh: ParallelMesh, seq_len: int, repeats: int) -> Measured:
    lengths = (seq_len // case.documents,) * case.documents
    documents = Documents((lengths,), seq_len)
    torch.manual_seed(0)
    shapes = ((HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM))
    whole = [torch.randn(1, seq_len, *shape, requires_grad=True) for shape in shapes]
    cotangent = torch.randn(1, seq_len, HEADS, HEAD_DIM)

    alone = SoftmaxAttention(case.mask)
    attn_metadata = batch_metadata(alone, documents)
    expected = alone(*whole, attn_metadata)
    gradients = torch.autograd.grad(expected, whole, cotangent)

    sharded = SoftmaxAttention(case.mask)
    apply_plan(torch.nn.Sequential(sharded), mesh.cp, {"0": case.style})
    ids = torch.zeros(1, seq_len, dtype=torch.int64)
    _, plan = shard_batch({"input_ids": ids}, mesh, case.layout, model=sharded, documents=documents)
    local = [plan.shard(x.detach()).requires_grad_() for x in whole]
    kept: list[int] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(_weigh(kept), lambda x: x),
        count_traffic() as forward,
    ):
        out = sharded(*local, plan.attn_metadata)
    with count_traffic() as backward:
        sharded_gradients = torch.autograd.grad(out, local, plan.shard(cotangent))
    torch.testing.assert_close(out, plan.shard(expected.detach()), rtol=2e-5, atol=2e-5)
    for ours, theirs in zip(sharded_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, plan.shard(theirs), rtol=2e-4, atol=2e-4)

    formula = _formula(case, plan, mesh)
    lse = 4 * out.shape[1] * HEADS
    size = sum(x.numel() * x.element_size() for x in (*local, out)) + lse
    step = _seconds(lambda: _step(sharded, local, plan, cotangent), repeats, together=True)
    ideal = _seconds(
        lambda: _step_alone(alone, whole, attn_metadata, cotangent), repeats
    ) / mesh.size("cp")
    received = (forward.received, backward.received)
    return Measured(received, formula, sum(kept) / size, step, ideal)


def _formula(case: Case, plan: ShardedBatch, mesh: ParallelMesh) -> tuple[int, int]:
    shape = AttentionShape(1, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, 4)
    mixer = SoftmaxAttention(case.mask)
    stated = case.style.received(mixer, plan.coords, plan.layout, mesh.rank("cp"), shape)
    return stated.forward, stated.backward


def _weigh(kept: list[int]) -> Callable[[Tensor], Tensor]:
    """Note the bytes of each float tensor kept; tables are integers and shared by all layers."""

    def pack(x: Tensor) -> Tensor:
        if x.is_floating_point():
            part = x.to_local() if isinstance(x, DTensor) else x
            kept.append(part.numel() * part.element_size())
        return x

    return pack


def _step(module: Any, local: list[Tensor], plan: ShardedBatch, cotangent: Tensor) -> None:
    torch.autograd.grad(module(*local, plan.attn_metadata), local, plan.shard(cotangent))


def _step_alone(module: Any, whole: list[Tensor], attn_metadata: Any, cotangent: Tensor) -> None:
    torch.autograd.grad(module(*whole, attn_metadata), whole, cotangent)


def _seconds(work: Callable[[], None], repeats: int, *, together: bool = False) -> float:
    """Median seconds; `together` starts the ranks at once."""
    taken = []
    for _ in range(repeats + 1):
        if together:
            dist.barrier()
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def _row(case: Case, ranks: list[Measured]) -> list[str]:
    received = [max(m.received[way] for m in ranks) for way in (0, 1)]
    formula = [max(m.formula[way] for m in ranks) for way in (0, 1)]
    packed = "" if case.documents == 1 else f", {case.documents} documents"
    window = "window" if isinstance(case.style, HaloAttention) else "causal"
    step = max(m.step for m in ranks) / statistics.median(m.ideal for m in ranks)
    return [
        case.name,
        case.layout.__name__,
        f"{window}{packed}",
        f"{received[0] / 1024:.1f}",
        _ratio(received[0], formula[0]),
        f"{received[1] / 1024:.1f}",
        _ratio(received[1], formula[1]),
        f"{max(m.kept for m in ranks):.2f}",
        f"{step:.2f}",
    ]


def _ratio(counted: int, stated: int) -> str:
    return "1.000" if counted == stated else f"{counted / stated:.3f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", default="", help="hardware name of the file under results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
