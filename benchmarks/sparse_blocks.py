"""Attention to picked blocks, Qwen4's, under CP: what is received, and a step beside all-gather.

    python -m benchmarks.sparse_blocks
    python -m benchmarks.sparse_blocks --seq-len 4096 --repeats 3 --write cpu

By formula, at the widths of Qwen4 in bf16: received bytes of the busiest rank and layer, and those
of all-gather attention, which brings the same keys and values and reads all of them. Measured: one
mixer, forward and backward, small, on gloo ranks, both in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from benchmarks.on_ranks import measured_on_ranks
from benchmarks.report import conditions, publish, table
from dtcp.batch import shard_batch
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.mixer_plan import apply_plan
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from dtcp.sequence.masks import Causal
from dtcp.softmax import AllGatherAttention
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.softmax.moves import AttentionShape
from dtcp.sparse_blocks import BlockIndex, SparseBlockAttention, SparseBlockCP, SparseBlockShape

KV_HEADS, DIM, INDEX_DIM, BF16 = 2, 256, 128 + 64, 2
"""As of transformers' config; an index key and its rotary table."""
ROWS = ((131_072, 8), (1_048_576, 8), (1_048_576, 64))
HEADS, SMALL_DIM, INDEX_HEADS, SMALL_INDEX = 8, 64, 8, 32
BLOCKS, BLOCK_LEN = 16, 32
WAYS: Mapping[str, ParallelStyle] = {"blocks": SparseBlockCP(), "all": AllGatherAttention()}


def stated_table() -> str:
    """Bytes by formula: of the last rank, whose queries see the whole row."""
    rows = []
    mixer, every = SparseBlockAttention(BLOCKS, BLOCK_LEN), SoftmaxAttention(Causal())
    of_blocks = SparseBlockShape(1, KV_HEADS, DIM, DIM, INDEX_DIM, BF16)
    of_all = AttentionShape(1, KV_HEADS, KV_HEADS, DIM, DIM, BF16)
    for seq_len, ranks in ROWS:
        where = Coords.of(Documents.single(1, seq_len)), HeadTail(seq_len, ranks), 0
        a = SparseBlockCP().received(mixer, *where, of_blocks)
        b = AllGatherAttention().received(every, *where, of_all)
        sizes = (a.forward, b.forward, a.backward, b.backward)
        rows.append([f"{seq_len:,}", f"{ranks}", *(f"{x / 2**20:,.0f}" for x in sizes)])
    head = ("S", "n", "fwd MiB", "all-gather", "bwd MiB", "all-gather")
    return table(head, rows)


class _Layer(nn.Module):
    """A mixer on a rank's shard of one document, and its inputs."""

    def __init__(self, way: str, mesh: ParallelMesh, seq_len: int) -> None:
        super().__init__()
        blocks = SparseBlockAttention(BLOCKS, BLOCK_LEN)
        self.mixer = blocks if way == "blocks" else SoftmaxAttention(Causal())
        apply_plan(self, mesh.cp, {"mixer": WAYS[way]})
        torch.manual_seed(0)
        ids = {"input_ids": torch.zeros(1, seq_len, dtype=torch.int64)}
        self.batch = shard_batch(ids, mesh, HeadTail, model=self)[1]
        shapes = [(HEADS, SMALL_DIM), *((KV_HEADS, SMALL_DIM),) * 2]
        shapes += [(INDEX_HEADS, SMALL_INDEX), (SMALL_INDEX,), (HEADS, SMALL_DIM)]
        rows = [self.batch.shard(torch.randn(1, seq_len, *shape)) for shape in shapes]
        *self.qkv, index_q, key, self.grad = rows
        self.qkv = [x.requires_grad_() for x in self.qkv]
        index = BlockIndex(index_q, key, key[..., :16], lambda mean, _: mean)
        self.index = (index,) if way == "blocks" else ()

    def forward(self) -> Tensor:
        out: Tensor = self.mixer(*self.qkv, *self.index, self.batch.attn_metadata)
        return out

    def step(self) -> float:
        """Seconds of a step that all ranks start at once."""
        dist.barrier()
        start = time.perf_counter()
        torch.autograd.grad(self(), self.qkv, self.grad)
        return time.perf_counter() - start


def _rank(rank: int, ranks: int, seq_len: int, repeats: int, results: Any) -> None:
    mesh = ParallelMesh.from_degrees(Degrees(cp=ranks), "cpu")
    for way in WAYS:
        layer = _Layer(way, mesh, seq_len)
        with count_traffic() as traffic:
            layer.step()
        seconds = statistics.median(layer.step() for _ in range(repeats))
        results[way, rank] = seconds, traffic.received


def main() -> None:
    """Print what is stated, measure on real ranks, print that."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", default="", help="hardware name of the file under results/")
    args = parser.parse_args()
    measured = measured_on_ranks(args.ranks, _rank, args.ranks, args.seq_len, args.repeats)
    rows = []
    for way in WAYS:
        of_ranks = [measured[way, rank] for rank in range(args.ranks)]
        seconds, received = (max(values) for values in zip(*of_ranks, strict=True))
        rows.append([way, f"{seconds:.2f}", f"{received / 1024:,.0f}"])
    text = f"{conditions('benchmarks.sparse_blocks', vars(args))}\n\n"
    text += "By formula, the busiest rank and a layer of Qwen4's widths, bf16, head-tail\n\n"
    text += f"{stated_table()}\n\nMeasured: one mixer, heads {HEADS} on {KV_HEADS} of {SMALL_DIM}, "
    text += f"index heads {INDEX_HEADS} x {SMALL_INDEX}, {BLOCKS} blocks of {BLOCK_LEN} tokens, "
    text += "fp32, head-tail, forward and backward, median, beside all-gather attention to all "
    text += f"tokens\n\n{table(('reads', 'seconds', 'received KiB'), rows)}\n"
    publish("sparse_blocks", args.write, text)


if __name__ == "__main__":
    main()
