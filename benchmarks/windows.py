"""What windows and global layers of a Gemma 4 cost under context parallelism.

    python -m benchmarks.windows
    python -m benchmarks.windows --seq-len 8192 --window 512 --write cpu

Bytes received in a forward pass, per layer kind and for whole models, by formula: ours, a ring of
whole chunks, and an all-gather of all keys (tests/softmax holds ours against what real
ranks count). Then, measured: the time to build a batch's masks, and a step of a window layer on
two ranks, ours and two kinds of all-gather in the same run, each checked against the others.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from benchmarks.on_ranks import measured_on_ranks
from benchmarks.report import conditions, publish, table
from benchmarks.window_bytes import LayerBytes, all_gather, ours, total, whole_chunk_ring
from dtcp.batch import shard_batch
from dtcp.distributed import collectives
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.kernels.softmax.api import SoftmaxParams
from dtcp.kernels.softmax.block_ranges import block_ranges
from dtcp.mixer_plan import apply_plan
from dtcp.models.gemma4 import PRESETS, Block, Gemma4Config, HeadShape, LayerType, layer_pattern
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.masks import Causal, SlidingWindow
from dtcp.sharded_batch import ShardedBatch
from dtcp.softmax import HaloAttention, RingAttention
from dtcp.softmax.local import ATTENTION
from dtcp.softmax.metadata import LocalMetadata
from dtcp.softmax.mixer import KeysFromValues, SoftmaxAttention
from dtcp.softmax.op import AttentionInputs

MODEL = "gemma4-31b"
LENGTHS, RANKS = (2**17, 2**20), (8, 16, 32, 64)
WAYS: dict[str, tuple[type[SequenceLayout], LayerBytes]] = {
    "ours, contiguous": (Contiguous, ours),
    "ours, head-tail": (HeadTail, ours),
    "whole-chunk ring": (Contiguous, whole_chunk_ring),
    "all-gather": (Contiguous, all_gather),
}
STEPS = ("halo (ours)", "all-gather, our kernel", "all-gather, dense mask")


def main() -> None:
    """Print every table, and keep them if asked to."""
    args = _arguments()
    parts = [
        conditions("benchmarks.windows", vars(args)),
        f"## Bytes of whole models\n\n{MODEL} and gemma4-e4b, bf16, one document a row, forward, "
        f"by formula: GB received by the rank that receives most (and on average).",
        table(("model", "S", "ranks", *WAYS), [*_models(MODEL), *_models("gemma4-e4b")]),
        _ranks_text(),
        f"## Bytes of a layer\n\n{MODEL}, S = 131072, 8 ranks: MB received, at most.",
        table(("layer", *WAYS), _kinds()),
        "## Building masks\n\nOnce a batch and layer kind, on the host, one row of one document, "
        f"rank 1 of 8, head-tail, {MODEL}: milliseconds, median.",
        table(("layer", "S = 131072", "S = 1048576"), _building(args.repeats)),
        _steps_text(args),
    ]
    text = "\n\n".join(parts) + "\n"
    publish("windows", args.write, text)


def _models(name: str) -> list[list[str]]:
    rows = []
    for seq_len in LENGTHS:
        for ranks in RANKS:
            totals = [
                total(PRESETS[name], layout(seq_len, ranks), way) for layout, way in WAYS.values()
            ]
            gigabytes = [f"{x.most / 1e9:.2f} ({x.mean / 1e9:.2f})" for x in totals]
            rows.append([name, f"{seq_len}", f"{ranks}", *gigabytes])
    return rows


def _ranks_text() -> str:
    """Which rank receives what, and what it would take for the worst one to receive less."""
    config, ranks = PRESETS[MODEL], range(8)
    rows, sums = [], {}
    for kind in (Contiguous, HeadTail):
        layout = kind(2**17, 8)
        for layer_type in LayerType:
            layers = [i for i, sees in enumerate(config.layer_types) if sees is layer_type]
            sums[layer_type] = [
                sum(ours(config, layout, i, rank) for i in layers) for rank in ranks
            ]
            rows.append([kind.__name__, layer_type.name.lower(), *_gigabytes(sums[layer_type])])
        rows.append([kind.__name__, "all", *_gigabytes(map(sum, zip(*sums.values(), strict=True)))])
    halo = (
        (config.window - 1)
        * 2
        * config.sliding_heads.num_kv_heads
        * config.sliding_heads.head_dim
        * 2
    )
    layers = config.layer_types.count(LayerType.SLIDING)
    return (
        f"## Bytes by rank\n\n{MODEL}, S = 131072, 8 ranks, forward: GB received by each. HeadTail "
        f"gives its rank 1 the sixteenth of the row next to last, so {13 / 16:.4f} of all global "
        f"keys, and two halos of {halo * layers / 1e9:.3f} GB over the {layers} sliding layers. "
        f"Whatever pairs of stretches a layout makes, a rank whose stretch ends where the last one "
        f"begins reads what lies between; two halos and that stay below 5.6 GB only if the last "
        f"stretch is longer than a whole shard (docs/decisions.md).\n\n"
        f"{table(('layout', 'layers', *map(str, ranks)), rows)}"
    )


def _gigabytes(sums: Iterable[int]) -> list[str]:
    return [f"{x / 1e9:.3f}" for x in sums]


def _kinds() -> list[list[str]]:
    config, rows = PRESETS[MODEL], []
    for layer_type in LayerType:
        layer = config.layer_types.index(layer_type)
        cells = []
        for layout, way in WAYS.values():
            most = max(way(config, layout(2**17, 8), layer, rank) for rank in range(8))
            cells.append(f"{most / 1e6:.1f}")
        rows.append([layer_type.name.lower(), *cells])
    return rows


def _building(repeats: int) -> list[list[str]]:
    config = PRESETS[MODEL]
    window = SoftmaxAttention(Causal() & SlidingWindow(config.window))
    kinds: dict[str, Callable[..., Any]] = {
        "sliding": partial(HaloAttention(config.window).make_metadata, window),
        "global": partial(RingAttention().make_metadata, KeysFromValues(Causal())),
    }
    rows = []
    for name, build in kinds.items():
        cells = []
        for seq_len in LENGTHS:
            coords = Coords.of(Documents.single(1, seq_len))
            seconds = _median(partial(build, coords, HeadTail(seq_len, 8), 1), repeats)
            cells.append(f"{1e3 * seconds:.1f}")
        rows.append([name, *cells])
    return rows


def _steps_text(args: argparse.Namespace) -> str:
    measured = measured_on_ranks(2, _rank, args.seq_len, args.window, args.repeats)
    shape = _shape(args.window)
    rows = []
    for name in STEPS:
        attention, layer = (max(measured[name, part, r] for r in (0, 1)) for part in (0, 1))
        first = [max(measured[STEPS[0], part, r] for r in (0, 1)) for part in (0, 1)]
        ratios = (f"{attention / first[0]:.1f}", f"{layer / first[1]:.1f}")
        rows.append([name, f"{attention:.3f}", ratios[0], f"{layer:.3f}", ratios[1]])
    head = ("window layer", "attention s", "/ ours", "whole layer s", "/ ours")
    return (
        f"## A step of a window layer\n\nForward and backward on two ranks, contiguous, fp32, "
        f"eager, median of {args.repeats}, the slower rank: S = {args.seq_len}, W = {args.window}, "
        f"dim {shape.dim}, hidden {shape.hidden_dim}, heads {shape.num_heads}, kv heads "
        f"{shape.sliding_heads.num_kv_heads}, head dim {shape.sliding_heads.head_dim}. The "
        f"all-gathers bring all keys and values; one then computes what the window sees, as ours "
        f"does, the other calls torch's SDPA with a mask of [L, S].\n\n{table(head, rows)}"
    )


def _shape(window: int) -> Gemma4Config:
    return Gemma4Config(
        vocab_size=64,
        dim=512,
        hidden_dim=2048,
        num_heads=8,
        layer_types=layer_pattern("sg", 2),
        window=window,
        sliding_heads=HeadShape(64, 4, 1e4),
        global_heads=HeadShape(64, 4, 1e6),
    )


def _rank(rank: int, seq_len: int, window: int, repeats: int, results: Any) -> None:
    mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    torch.manual_seed(0)
    block = Block(_shape(window), 0)
    apply_plan(block, mesh.cp, {"attention.mixer": HaloAttention(window)})
    documents = Documents.single(1, seq_len)
    ids = torch.zeros(1, seq_len, dtype=torch.int64)
    _, plan = shard_batch({"input_ids": ids}, mesh, Contiguous, model=block, documents=documents)

    halo: Any = block.attention.mixer.forward
    gathers = (_gathered(plan, window, dense=dense) for dense in (False, True))
    ways: tuple[Any, ...] = (halo, *gathers)
    torch.manual_seed(1 + rank)
    qkv = [torch.randn(1, seq_len // 2, heads, 64, requires_grad=True) for heads in (8, 4, 4)]
    x = torch.randn(1, seq_len // 2, 512, requires_grad=True)
    position_ids = torch.arange(seq_len // 2)[None] + rank * seq_len // 2
    first = _attend(halo, qkv, plan)
    for way in ways[1:]:
        for expected, actual in zip(first, _attend(way, qkv, plan), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    taken: dict[tuple[str, int], list[float]] = {}
    # Ways take turns, so that a slow moment of the machine is nobody's alone.
    for _ in range(repeats + 1):
        for name, way in zip(STEPS, ways, strict=True):
            block.attention.mixer.forward = way
            parts = (
                partial(_attend, way, qkv, plan),
                partial(_layer, block, x, position_ids, plan),
            )
            for part, work in enumerate(parts):
                dist.barrier()
                taken.setdefault((name, part), []).append(_seconds(work))
    for (name, part), seconds in taken.items():
        results[name, part, rank] = statistics.median(seconds[1:])


def _gathered(plan: ShardedBatch, window: int, *, dense: bool) -> Callable[..., Tensor]:
    """Attention that brings all keys and values, whatever the window."""
    axis = plan.mesh.cp
    assert axis is not None
    first, last = (Causal() & SlidingWindow(window)).intervals(plan.coords)
    index = torch.arange(plan.layout.seq_len, dtype=torch.int32)
    first, last = (plan.layout.shard(x, axis.get_local_rank()) for x in (first, last))
    metadata = LocalMetadata(first, last, index, block_ranges(first, last, index))
    mask = (index >= first[0, :, None]) & (index <= last[0, :, None])  # [L, S]

    def attend(q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
        k, v = (collectives.all_gather(x, axis, dim=1) for x in (k, v))
        if not dense:
            return ATTENTION(AttentionInputs(q, k, v), metadata, SoftmaxParams(1.0))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=1.0, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


def _attend(way: Any, qkv: list[Tensor], plan: ShardedBatch) -> tuple[Tensor, ...]:
    out = way(*(x / 4 for x in qkv), plan.attn_metadata)
    return (out.detach(), *torch.autograd.grad(out, qkv, torch.ones_like(out)))


def _layer(block: Block, x: Tensor, position_ids: Tensor, plan: ShardedBatch) -> None:
    out, _ = block(x, position_ids, plan.attn_metadata, None, None)
    wanted = [x, *(p for p in block.parameters())]
    torch.autograd.grad(out, wanted, torch.ones_like(out))


def _median(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds after one run to warm up."""
    return statistics.median([_seconds(work) for _ in range(repeats + 1)][1:])


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", default="", help="hardware name of the file under results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
