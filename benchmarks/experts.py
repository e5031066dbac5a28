"""What it takes to have experts on ranks of their own, against having all of them everywhere.

    python -m benchmarks.experts
    python -m benchmarks.experts --tokens 512 --write cpu

Bytes that a rank receives in a step, per layer, by formula, at published sizes: tokens to experts
and results home; all experts gathered, as FSDP does; tokens gathered, for experts split in their
channels. Then on real ranks: bytes as counted against the formula, and a step of one layer of
experts in the three ways, in the same run and checked against each other.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F

from benchmarks.on_ranks import measured_on_ranks
from benchmarks.report import conditions, publish, table
from dtcp.distributed.collectives import all_gather, reduce_scatter
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.experts.expected_moves import ExpertSizes, expected_moves
from dtcp.models.moe import Experts
from dtcp.parallelize.experts import ExpertParallel, ExpertTensorParallel

RANKS = (4, 8, 16, 64, 256)
SHARED = 4
"""Hidden channels of the shared expert, in those of an expert."""
TP_WAYS = ("tokens travel (ours, ep over tp)", "experts split over tp")
OVERLAP = ("while tokens travel (ours)", "after")
WAYS = ("tokens travel (ours)", "experts gathered", "experts split, tokens gathered")


@dataclass(frozen=True)
class Shape:
    """A layer of experts."""

    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int

    @property
    def weights(self) -> int:
        """Numbers in the weights of all experts."""
        return 3 * self.num_experts * self.hidden_dim * self.dim


SHAPES = {
    "DeepSeek-V4-Flash": Shape(4096, 2048, 256, 6),
    "Qwen3.5-35B-A3B": Shape(2048, 512, 256, 8),
    "Gemma4-26B-A4B": Shape(2816, 704, 128, 8),
}
"""From the published configurations."""


def tokens_travel(shape: Shape, tokens: int, ranks: int, size: int) -> int:
    """Bytes that a rank receives in a step where each choice falls on each expert alike.

    A row for each choice on another rank, there and back, forward and backward; and the counts.
    """
    received = expected_moves(_sizes(shape, tokens, size), ranks).received
    return received.forward + received.backward


def crossing(shape: Shape, tokens: int, ranks: int, size: int) -> tuple[int, int]:
    """Bytes of them that come from other nodes of 8 ranks: straight, and once for each node."""
    straight, by_node = (
        expected_moves(_sizes(shape, tokens, size), ranks, ranks_per_node=each) for each in (0, 8)
    )
    first, second = (
        sum(moved.crossing(0, 8)[1] for moved in (moves.forward, moves.backward))
        for moves in (straight, by_node)
    )
    return first, second


def _sizes(shape: Shape, tokens: int, size: int) -> ExpertSizes:
    return ExpertSizes(tokens, shape.dim, shape.num_experts, shape.top_k, size)


def experts_gathered(shape: Shape, ranks: int, size: int) -> float:
    """All weights of others, forward and backward, and the gradients of the own ones, in fp32."""
    others = shape.weights * (ranks - 1) / ranks
    return 2 * others * size + others * 4


def tokens_gathered(shape: Shape, tokens: int, ranks: int, size: int) -> float:
    """The tokens of all others and sums of results, and the same backward."""
    return 4 * (ranks - 1) * tokens * shape.dim * size


def main() -> None:
    """Print every table, and keep them if asked to."""
    args = _arguments()
    head = ("model", "ranks", *WAYS, "gathered / ours")
    across = ("model", "ranks", "straight", "once a node", "straight / once")
    parts = [
        conditions("benchmarks.experts", vars(args)),
        "## Bytes of a layer, by formula\n\nGB that a rank receives in a step, forward and "
        "backward, bf16, 8,192 tokens a rank, every expert chosen alike; gradients of weights in "
        f"fp32.\n\n{table(head, _formula(8192))}",
        "## Bytes between nodes of 8 ranks\n\nGB of them that a rank receives from other nodes: a "
        "row for each choice, or a row for each node that holds a chosen expert, with the choices "
        f"and weights of its token.\n\n{table(across, _across())}",
    ]
    for ranks in (2, 4):
        measured = _run(args, ranks)
        parts += [_step_table(args, ranks, measured), _tp_table(args, ranks, measured)]
        parts.append(_overlap_table(args, ranks, measured))
    text = "\n\n".join(parts) + "\n"
    publish("experts", args.write, text)


def _formula(tokens: int) -> list[list[str]]:
    rows = []
    for name, shape in SHAPES.items():
        for ranks in RANKS:
            if shape.num_experts % ranks:
                continue
            bytes_received = (
                tokens_travel(shape, tokens, ranks, 2),
                experts_gathered(shape, ranks, 2),
                tokens_gathered(shape, tokens, ranks, 2),
            )
            cells = [f"{x / 1e9:.2f}" for x in bytes_received]
            rows.append([name, f"{ranks}", *cells, f"{bytes_received[1] / bytes_received[0]:.1f}"])
    return rows


def _across() -> list[list[str]]:
    rows = []
    for name, shape in SHAPES.items():
        for ranks in (16, 64, 256):
            if shape.num_experts % ranks == 0:
                straight, once = crossing(shape, 8192, ranks, 2)
                cells = [f"{straight / 1e9:.2f}", f"{once / 1e9:.2f}", f"{straight / once:.2f}"]
                rows.append([name, f"{ranks}", *cells])
    return rows


def _run(args: argparse.Namespace, ranks: int) -> dict[Any, Any]:
    """What every rank found."""
    shape = Shape(args.dim, args.hidden_dim, args.num_experts, args.top_k)
    return measured_on_ranks(ranks, _rank, ranks, shape, args)


def _rows(measured: dict[Any, Any], names: Sequence[str], ranks: int) -> list[list[str]]:
    slowest = {name: max(measured[name, rank] for rank in range(ranks)) for name in names}
    first = slowest[names[0]]
    return [[name, f"{1e3 * x:.1f}", f"{x / first:.2f}"] for name, x in slowest.items()]


def _step_table(args: argparse.Namespace, ranks: int, measured: dict[Any, Any]) -> str:
    shape = Shape(args.dim, args.hidden_dim, args.num_experts, args.top_k)
    received = sum(measured["received", rank] for rank in range(ranks))
    expected = sum(measured["expected", rank] for rank in range(ranks))
    return (
        f"## A step on {ranks} ranks\n\nForward and backward of one layer of {shape}, "
        f"{args.tokens} tokens a rank, fp32, eager, median of {args.repeats}, the slowest rank.\n\n"
        f"{table(('way', 'ms', '/ ours'), _rows(measured, WAYS, ranks))}\n\nReceived by tokens and "
        f"results on all ranks: {received:,} bytes as counted, {expected:,} by the routing."
    )


def _tp_table(args: argparse.Namespace, ranks: int, measured: dict[Any, Any]) -> str:
    return (
        f"The same layer under tp {ranks}, whose ranks hold the same {args.tokens * ranks} "
        f"tokens.\n\n"
        f"{table(('way', 'ms', '/ ours'), _rows(measured, TP_WAYS, ranks))}"
    )


def _overlap_table(args: argparse.Namespace, ranks: int, measured: dict[Any, Any]) -> str:
    return (
        f"The same layer with a shared expert of {SHARED} times the hidden channels.\n\n"
        f"{table(('way', 'ms', '/ ours'), _rows(measured, OVERLAP, ranks))}"
    )


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _rank(rank: int, ranks: int, shape: Shape, args: Any, results: Any) -> None:
    mesh = ParallelMesh.from_degrees(Degrees(cp=ranks, ep=ranks), "cpu")
    assert mesh.ep is not None
    torch.manual_seed(0)
    whole = Experts(shape.dim, shape.hidden_dim, shape.num_experts, _swiglu).eval()
    ways = dict(zip(WAYS, _ways(whole, shape, mesh.ep), strict=True))
    torch.manual_seed(1 + rank)
    x = torch.randn(args.tokens, shape.dim)
    scores = torch.randn(args.tokens, shape.num_experts).softmax(-1)
    weight, index = scores.topk(shape.top_k, dim=-1)
    inputs = (x, index, weight)

    expected = _step(ways[WAYS[1]], inputs)
    for way in (WAYS[0], WAYS[2]):
        torch.testing.assert_close(_step(ways[way], inputs), expected, rtol=1e-3, atol=1e-4)
    with count_traffic() as traffic:
        _step(ways[WAYS[0]], inputs)
    row = shape.dim * x.element_size()
    results["received", rank] = sum(
        traffic[f"dtcp::{op}"].received for op in ("dispatch_tokens", "combine_results")
    )
    results["expected", rank] = 2 * row * _rows_here(index, shape, mesh.ep)
    together: Any = tuple(all_gather(y, mesh.ep, dim=0) for y in inputs)
    by_tp = dict(zip(TP_WAYS, _tp_ways(whole, mesh.ep), strict=True))
    expected = _step(by_tp[TP_WAYS[0]], together)
    torch.testing.assert_close(_step(by_tp[TP_WAYS[1]], together), expected, rtol=1e-3, atol=1e-4)
    shared = dict(zip(OVERLAP, _with_shared(ways[WAYS[0]], shape), strict=True))
    calls = [(name, call, inputs) for name, call in (*ways.items(), *shared.items())]
    calls += [(name, call, together) for name, call in by_tp.items()]
    taken: dict[str, list[float]] = {name: [] for name, *_ in calls}
    # Ways take turns, so that a slow moment of the machine is nobody's alone.
    for _ in range(args.repeats + 1):
        for name, call, given in calls:
            dist.barrier()
            start = time.perf_counter()
            _step(call, given)
            dist.barrier()
            taken[name].append(time.perf_counter() - start)
    for name, seconds in taken.items():
        results[name, rank] = statistics.median(seconds[1:])


def _rows_here(index: Tensor, shape: Shape, ep: DeviceMesh) -> int:
    """Rows that this rank receives one way: of others to its experts, and of its own from home."""
    whole, n, rank = all_gather(index, ep, dim=0), ep.size(), ep.get_local_rank()
    holder = whole // (shape.num_experts // n)
    home = (torch.arange(len(whole)) // len(index))[:, None]
    away = holder != home
    return int((away & ((holder == rank) | (home == rank))).sum())


def _ways(whole: Experts, shape: Shape, ep: DeviceMesh) -> list[nn.Module | Callable[..., Tensor]]:
    ours, gathered = copy.deepcopy(whole), copy.deepcopy(whole)
    parallelize_module(ours, ep, ExpertParallel())
    fully_shard(gathered, mesh=ep)
    gathered.set_gradient_divide_factor(1.0)  # type: ignore[operator]
    gathered.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    width = shape.hidden_dim // ep.size()
    own = slice(ep.get_local_rank() * width, (ep.get_local_rank() + 1) * width)
    part = Experts(shape.dim, width, shape.num_experts, _swiglu).eval()
    with torch.no_grad():
        part.gate.copy_(whole.gate[:, own])
        part.up.copy_(whole.up[:, own])
        part.down.copy_(whole.down[:, :, own])

    def split(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        x, index, weight = (all_gather(y, ep, dim=0) for y in (x, index, weight))
        return reduce_scatter(part(x, index, weight), ep, dim=0)

    return [ours, gathered, split]


def _tp_ways(whole: Experts, tp: DeviceMesh) -> list[nn.Module]:
    """Of tokens that all ranks hold: experts on their own ranks, and a part of each on all."""
    ours, split = copy.deepcopy(whole), copy.deepcopy(whole)
    parallelize_module(ours, tp, ExpertParallel(shared_by=tp))
    parallelize_module(split, tp, ExpertTensorParallel())
    return [ours, split]


def _with_shared(ours: Any, shape: Shape) -> list[Callable[..., Tensor]]:
    """A shared expert while tokens travel, and after they have."""
    width = SHARED * shape.hidden_dim
    shared = nn.Sequential(nn.Linear(shape.dim, width), nn.SiLU(), nn.Linear(width, shape.dim))

    def beside(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = ours(x, index, weight, None, lambda: shared(x))
        return out

    def after(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = ours(x, index, weight) + shared(x)
        return out

    return [beside, after]


def _step(call: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    x, index, weight = inputs
    x, weight = (y.detach().requires_grad_() for y in (x, weight))
    out = call(x, index, weight)
    out.backward(torch.ones_like(out))
    return [out.detach(), x.grad, weight.grad]  # type: ignore[list-item]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="of each rank")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--hidden-dim", type=int, default=256)
    parser.add_argument("--num-experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", default="", help="hardware name of the file under results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
