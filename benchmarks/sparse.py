"""DeepSeek-V4's attention under CP: what is received, the largest temporary, and a layer's step.

    python -m benchmarks.sparse
    python -m benchmarks.sparse --seq-len 8192 --repeats 3 --write cpu

By formula, at the sizes of DeepSeek-V4-Flash in bf16: received bytes of a rank and layer, and the
largest temporary of attention, ours and the published way (NeMo Automodel, Miles). The published
way gathers raw keys, and of layers with an indexer every token to pool, in fp32; it adds a mask
of [L, S + P] to the scores. Measured: one attention layer, forward and backward, small, on gloo
ranks, ours beside the published way on its dense torch path, in the same run; where the two
differ on a shorter row in fp64, nothing is reported, the run fails.
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.parallel import ParallelStyle

from benchmarks.on_ranks import measured_on_ranks
from benchmarks.published_sparse import PublishedSparseCP
from benchmarks.report import conditions, publish, table
from dtcp.batch import shard_batch
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.kernels.sparse.indexer import MAX_INDEX_SCORES
from dtcp.kernels.sparse.reference import MAX_TILE_SCORES
from dtcp.kernels.sparse.types import SPARSE_TILE
from dtcp.mixer_plan import apply_plan
from dtcp.models.deepseek_v4 import PRESETS, DeepseekV4Config, tiny
from dtcp.models.deepseek_v4.attention import Attention
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sparse import CompressedSparseCP
from dtcp.sparse.metadata import segment_entries
from dtcp.sparse.mixer import CompressedSparseAttention, Compression
from dtcp.sparse.moves import SparseShape

KINDS: Mapping[str, int] = {"window": 0, "sparse": 4, "heavy": 128}
FLASH = PRESETS["deepseek-v4-flash"]
SMALL = replace(
    tiny(),
    dim=256,
    num_heads=4,
    head_dim=64,
    rope_dim=16,
    index_heads=8,
    index_head_dim=32,
    num_selected=512,
    window=128,
    compress_ratios=tuple(KINDS.values()),
    num_layers=len(KINDS),
    num_mtp_layers=0,
)
"""Seconds on two CPU cores: the ratios, window and selection of Flash, with small heads."""
ROWS = ((131_072, 8), *((1_048_576, n) for n in (8, 16, 32, 64)))
BF16, FP32 = 2, 4
CHECKED = 1024
"""Tokens of the rows that both ways are compared on, in fp64: rounding could turn a choice."""


@dataclass(frozen=True)
class Stated:
    """A rank's numbers for one layer, in bytes."""

    forward: int
    backward: int
    temporary: int


def ours(config: DeepseekV4Config, ratio: int, seq_len: int, ranks: int) -> Stated:
    """The most of any rank, by the style's own formula."""
    compression = _compression(config, ratio)
    layout, style = HeadTail(seq_len, ranks), CompressedSparseCP()
    mixer = CompressedSparseAttention(config.window, compression, scale=1.0)
    shape = SparseShape(1, config.head_dim, config.index_head_dim, BF16)
    # Ranks in the middle have two whole halos.
    coords = Coords.of(Documents.single(1, seq_len))
    received = style.received(mixer, coords, layout, ranks // 2, shape)
    return Stated(received.forward, received.backward, _tile(config, compression, layout))


def _tile(config: DeepseekV4Config, compression: Compression | None, layout: SequenceLayout) -> int:
    """Scores of a tile, or the entries picked for it, or the indexer's scores: the largest."""
    heads, keys = config.num_heads, SPARSE_TILE + config.window - 1
    if compression is None:
        return SPARSE_TILE * heads * keys * FP32
    entries = 2 * layout.num_shards * segment_entries(layout.segment_len, compression)
    if compression.selected is None:
        rows = min(SPARSE_TILE, max(1, MAX_TILE_SCORES // (heads * (keys + entries))))
        return rows * heads * (keys + entries) * FP32
    chosen = min(compression.selected, entries)
    picked = SPARSE_TILE * chosen * config.head_dim * FP32
    scored = min(MAX_INDEX_SCORES, SPARSE_TILE * config.index_heads * entries) * FP32
    return max(SPARSE_TILE * heads * (keys + chosen) * FP32, picked, scored)


def published(config: DeepseekV4Config, ratio: int, seq_len: int, ranks: int) -> Stated:
    """The published way's: all shards are alike."""
    others, compression = seq_len - seq_len // ranks, _compression(config, ratio)
    keys = others * config.head_dim * BF16
    length, entries = seq_len // ranks, 0 if compression is None else seq_len // compression.ratio
    if compression is None or compression.selected is None:
        pooled = others // ratio * config.head_dim * BF16 if compression else 0
        mask = length * (seq_len + entries) * BF16
        return Stated(keys + pooled, keys + pooled, mask)
    # Values and gates, two halves each, of entries and of the indexer's keys.
    windows = others * 4 * config.head_dim * FP32
    index = others * 4 * config.index_head_dim * FP32
    pooled, pooled_index = (
        others // ratio * dim * BF16 for dim in (config.head_dim, config.index_head_dim)
    )
    scores = length * entries * FP32
    mask = length * (seq_len + entries) * BF16
    forward = keys + windows + index + pooled + pooled_index
    return Stated(forward, keys + windows + pooled, max(scores, mask))


def _compression(config: DeepseekV4Config, ratio: int) -> Compression | None:
    if ratio == 0:
        return None
    sparse = Compression(ratio, overlap=True, selected=config.num_selected)
    return sparse if ratio == config.sparse_ratio else Compression(ratio)


def stated_table() -> str:
    """Bytes by formula."""
    head = ("S", "n", "layer", "fwd MiB", "published", "less", "bwd MiB", "published")
    head = (*head, "temporary MiB", "published")
    rows = []
    for seq_len, ranks in ROWS:
        for name, ratio in KINDS.items():
            a, b = (way(FLASH, ratio, seq_len, ranks) for way in (ours, published))
            rows.append(
                [
                    f"{seq_len:,}",
                    f"{ranks}",
                    name,
                    _mib(a.forward),
                    _mib(b.forward),
                    f"{b.forward / a.forward:.0f}x",
                    _mib(a.backward),
                    _mib(b.backward),
                    _mib(a.temporary),
                    _mib(b.temporary),
                ]
            )
    return table(head, rows)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.2f}" if size < 2**24 else f"{size / 2**20:,.0f}"


@dataclass(frozen=True)
class Measured:
    """One rank's step: seconds, and bytes received forward and backward."""

    seconds: float
    received: tuple[int, int]


def main() -> None:
    """Print what is stated, measure on real ranks, print that."""
    args = _arguments()
    measured = measured_on_ranks(args.ranks, _rank, args.ranks, args.seq_len, args.repeats)
    head = ("layer", "ours s", "published s", "faster", "ours fwd KiB", "published", "bwd", "")
    rows = [_row(name, measured, args.ranks) for name in KINDS]
    text = f"{conditions('benchmarks.sparse', vars(args))}\n\n"
    text += "By formula, a rank and layer of DeepSeek-V4-Flash, bf16, head-tail\n\n"
    text += f"{stated_table()}\n\nMeasured: one attention layer, dim {SMALL.dim}, heads "
    text += f"{SMALL.num_heads} x {SMALL.head_dim}, index heads {SMALL.index_heads} x "
    text += f"{SMALL.index_head_dim}, {SMALL.num_selected} selected, window {SMALL.window}, "
    text += f"fp32, {args.ranks} ranks, S = {args.seq_len}, forward and backward, median; ours "
    text += f"head-tail, the published way contiguous\n\n{table(head, rows)}\n"
    publish("sparse", args.write, text)


def _row(name: str, measured: Mapping[Any, Measured], ranks: int) -> list[str]:
    a, b = ([measured[name, way, rank] for rank in range(ranks)] for way in WAYS)
    seconds = [max(m.seconds for m in way_ranks) for way_ranks in (a, b)]
    bytes_ = [[max(m.received[way] for m in way_ranks) for way_ranks in (a, b)] for way in (0, 1)]
    sizes = [f"{size / 1024:,.0f}" for pair in bytes_ for size in pair]
    times = [f"{second:.2f}" for second in seconds]
    return [name, *times, f"{seconds[1] / seconds[0]:.1f}x", *sizes]


WAYS: Mapping[str, tuple[ParallelStyle, type[SequenceLayout]]] = {
    "ours": (CompressedSparseCP(), HeadTail),
    "published": (PublishedSparseCP(), Contiguous),
}


def _rank(rank: int, ranks: int, seq_len: int, repeats: int, results: Any) -> None:
    mesh = ParallelMesh.from_degrees(Degrees(cp=ranks), "cpu")
    for layer, name in enumerate(KINDS):
        ours, published = (_Layer(way, layer, mesh, CHECKED, torch.float64) for way in WAYS)
        torch.testing.assert_close(ours.whole(), published.whole())
        del ours, published
        for way in WAYS:
            results[name, way, rank] = _Layer(way, layer, mesh, seq_len).measure(repeats)


class _Layer:
    """One attention layer, carried out one way, and a rank's inputs to it."""

    def __init__(
        self,
        way: str,
        layer: int,
        mesh: ParallelMesh,
        seq_len: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        style, layout = WAYS[way]
        self.module = Attention(SMALL, layer).to(dtype)
        for parameter in self.module.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        x, cotangent = torch.randn(2, 1, seq_len, SMALL.dim, dtype=dtype)
        apply_plan(self.module, mesh.cp, {"mixer": style})
        documents = Documents.single(1, seq_len)
        local, self.plan = shard_batch(
            {
                "input_ids": torch.zeros(1, seq_len, dtype=torch.int64),
                "position_ids": documents.position_ids(),
            },
            mesh,
            layout,
            model=self.module,
            documents=documents,
        )
        self.x, self.grad = self.plan.shard(x).requires_grad_(), self.plan.shard(cotangent)
        self.token_index = local["position_ids"]

    def forward(self) -> Tensor:
        out: Tensor = self.module(self.x, self.token_index, self.plan.attn_metadata)
        return out

    def step(self) -> float:
        """Seconds of a step that all ranks start at once."""
        dist.barrier()
        start = time.perf_counter()
        torch.autograd.grad(self.forward(), self.x, self.grad)
        return time.perf_counter() - start

    def measure(self, repeats: int) -> Measured:
        with count_traffic() as forward:
            out = self.forward()
        with count_traffic() as backward:
            torch.autograd.grad(out, self.x, self.grad)
        del out
        seconds = statistics.median(self.step() for _ in range(repeats))
        return Measured(seconds, (forward.received, backward.received))

    def whole(self) -> list[Tensor]:
        """Output and input gradient of all ranks."""
        out = self.forward()
        (dx,) = torch.autograd.grad(out, self.x, self.grad)
        return [self.plan.gather(out.detach()), self.plan.gather(dx)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", default="", help="hardware name of the file under results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
