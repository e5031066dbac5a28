"""What a gated delta layer moves and takes over ranks, beside gathering everything.

    python -m benchmarks.delta_rule
    python -m benchmarks.delta_rule --ranks 4 --seq-len 8192 --write cpu

Ways to carry the layer out on head-tail shards, same weights, same result (or the run fails):

    states, gathered    each segment's map of the state, gathered; no activation moves
    states, scanned     the same maps, composed in log2(n) rounds
    relayout            tokens dealt to contiguous shards and back, one all-to-all each
    gather and sort     hidden states of all ranks gathered, sorted and sliced, and once more on
                        the way back; backward all-reduces (the published way)
    gather all          hidden states of all ranks gathered, the whole layer on every rank

Per way: bytes a rank received, forward and backward; median step. Then the exchange of states
alone, gathered and scanned, for summaries of several sizes; bytes by formula for a published shape,
up to 64 ranks; and on a GPU, what the summaries add to the plain kernel.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.on_ranks import measured_on_ranks
from benchmarks.report import conditions, publish, table
from dtcp.batch import shard_batch
from dtcp.distributed.ledger import LEDGER, count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.kernels.delta_rule.api import DeltaInputs, delta_kernel
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.models.qwen3_5 import PRESETS, DeltaNetConfig, GatedDeltaNet, Qwen35Config
from dtcp.recurrent import CausalConvCP, GatedDeltaCP, GatherStates, RelayoutCP, ScanStates
from dtcp.recurrent.exchange import entering_by_gather, entering_by_scan, summaries_received
from dtcp.recurrent.metadata import chain_of
from dtcp.recurrent.moves import DeltaShape
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sharded_batch import ShardedBatch

HEAD = ("way", "layout", "fwd KiB", "bwd KiB", "step ms", "of gather all", "of gather and sort")
MIB = 2**20
WAYS = ("gathered", "scanned")
EXCHANGED_HEADS = (1, 4, 16, 32)
EXCHANGE_REPEATS = 40


class Way(NamedTuple):
    """A way's name, the layout of the shards it is given, and the layer's call on them."""

    name: str
    layout: type[SequenceLayout]
    call: Callable[[Tensor], Tensor]


class Measured(NamedTuple):
    """Bytes received and median seconds of one rank."""

    forward: int
    backward: int
    step: float


def main() -> None:
    """Measure every way on real ranks and print the tables."""
    args = _arguments()
    parts = [conditions("benchmarks.delta_rule", vars(args))]
    for ranks in args.ranks:
        measured = measured_on_ranks(ranks, _rank, ranks, args)
        parts += [f"{ranks} ranks:", _rows(measured, ranks)]
        parts += ["States alone, ms, one direction:", _exchange_rows(measured)]
    parts.append(_by_formula())
    if torch.cuda.is_available():
        parts.append(_summary_overhead())
    text = "\n\n".join(parts) + "\n"
    publish("delta_rule", args.write, text)


def _rank(rank: int, ranks: int, args: argparse.Namespace, results: Any) -> None:
    mesh = ParallelMesh.from_degrees(Degrees(cp=ranks), "cpu")
    shape = Qwen35Config(
        vocab_size=8,
        dim=args.dim,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        feed_forward=8,
        delta=DeltaNetConfig(args.heads, args.heads, args.head_dim, args.head_dim),
    )
    for name, way in _measure(shape, mesh, args.seq_len, args.repeats).items():
        results[name, rank] = way
    for heads in EXCHANGED_HEADS:
        taken = _exchange_times(heads, mesh, EXCHANGE_REPEATS)
        if rank == 0:
            results["states", heads] = taken


def _measure(
    shape: Qwen35Config, mesh: ParallelMesh, seq_len: int, repeats: int
) -> dict[tuple[str, str], Measured]:
    """Every way, checked against one device, then timed in turn, so that noise meets all alike."""
    documents = Documents(((seq_len // 3, seq_len - seq_len // 3),), seq_len)
    torch.manual_seed(0)
    alone = GatedDeltaNet(shape)
    alone.reset_parameters(0.3)
    x, grad = (torch.randn(1, seq_len, shape.dim) for _ in range(2))
    leaf = x.clone().requires_grad_()
    expected = alone(leaf, batch_metadata(alone, documents))
    (right,) = torch.autograd.grad(expected, leaf, grad)

    measured: dict[tuple[str, str], Measured] = {}
    steps: dict[tuple[str, str], Callable[[], Any]] = {}
    for way, plan in _ways(alone, mesh, documents):
        local = plan.shard(x).requires_grad_()
        inputs = (local, *alone.parameters())
        cotangent = plan.shard(grad)
        with count_traffic() as forward:
            out = way.call(local)
        with count_traffic() as backward:
            dx, *_ = torch.autograd.grad(out, inputs, cotangent)
        torch.testing.assert_close(out, plan.shard(expected.detach()), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(dx, plan.shard(right), rtol=1e-3, atol=1e-3)
        key = (way.name, way.layout.__name__)
        measured[key] = Measured(forward.received, backward.received, 0.0)
        steps[key] = _step(way, inputs, cotangent)
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(repeats + 1):
        for key, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            taken[key].append(time.perf_counter() - start)
    return {key: m._replace(step=statistics.median(taken[key][1:])) for key, m in measured.items()}


def _exchange_times(heads: int, mesh: ParallelMesh, repeats: int) -> list[float]:
    """Median seconds until the slowest rank has its states: gathered, scanned; of each layout."""
    ways, n = [], mesh.size("cp")
    for layout in (Contiguous, HeadTail):
        chain = chain_of(layout(2 * n, n)).tolist()
        own = torch.randn(len(chain[0]), 1, heads, 128, 256) / 16
        for bring in (entering_by_gather, entering_by_scan):
            ways.append(partial(bring, own, chain, mesh.cp))
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats + 1):
        for bring, times in zip(ways, taken, strict=True):
            dist.barrier()
            start = time.perf_counter()
            bring()
            dist.barrier()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in taken]


def _step(way: Way, inputs: tuple[Tensor, ...], cotangent: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(way.call(inputs[0]), inputs, cotangent)


def _ways(
    alone: GatedDeltaNet, mesh: ParallelMesh, documents: Documents
) -> list[tuple[Way, ShardedBatch]]:
    by_states = []
    for states in (GatherStates(), ScanStates()):
        said = "gathered" if isinstance(states, GatherStates) else "scanned"
        for layout in (HeadTail, Contiguous):
            layer, plan = _sharded(alone, mesh, documents, layout, GatedDeltaCP(states))
            call = _bound(layer, plan)
            by_states.append((Way(f"states, {said}", layout, call), plan))
    states = GatedDeltaCP(GatherStates())
    dealt, plan = _sharded(alone, mesh, documents, HeadTail, states, relayout=True)
    contiguous, inside = _sharded(alone, mesh, documents, Contiguous, states)
    call = _bound(contiguous, inside)
    axis, source, target = mesh.cp, plan.layout, inside.layout

    def sorted_(x: Tensor) -> Tensor:
        whole = source.restore(_GatherReduce.apply(x, axis))
        out = _GatherReduce.apply(call(target.shard(whole, axis.get_local_rank())), axis)
        return source.shard(out, axis.get_local_rank())

    attn_metadata = batch_metadata(alone, documents)

    def gathered(x: Tensor) -> Tensor:
        return plan.shard(alone(source.restore(_GatherReduce.apply(x, axis)), attn_metadata))

    ways = (
        ("relayout", _bound(dealt, plan)),
        ("gather and sort", sorted_),
        ("gather all", gathered),
    )
    return by_states + [(Way(name, HeadTail, call), plan) for name, call in ways]


def _bound(layer: GatedDeltaNet, plan: ShardedBatch) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x, plan.attn_metadata)


def _sharded(
    alone: GatedDeltaNet,
    mesh: ParallelMesh,
    documents: Documents,
    layout: type[SequenceLayout],
    style: GatedDeltaCP,
    *,
    relayout: bool = False,
) -> tuple[GatedDeltaNet, ShardedBatch]:
    """The layer over the ranks, its weights shared with `alone`."""
    with torch.device("meta"):
        layer = GatedDeltaNet(_shape_of(alone))
    for name, parameter in alone.named_parameters():
        module, _, last = name.rpartition(".")
        layer.get_submodule(module).register_parameter(last, parameter)
    styles = {"conv": CausalConvCP(), "mixer": style}
    apply_plan(layer, mesh.cp, {**styles, **({"": RelayoutCP()} if relayout else {})})
    ids = torch.zeros(1, documents.seq_len, dtype=torch.int64)
    return layer, shard_batch({"input_ids": ids}, mesh, layout, model=layer, documents=documents)[1]


def _shape_of(layer: GatedDeltaNet) -> Qwen35Config:
    heads = layer.a_proj.out_features
    delta = DeltaNetConfig(heads, heads, layer.key_dim, layer.value_dim, layer.conv.width)
    dim = layer.a_proj.in_features
    return Qwen35Config(8, dim, 1, 1, 1, feed_forward=8, delta=delta)


class _GatherReduce(torch.autograd.Function):
    """All-gather along the sequence; backward all-reduces the whole gradient and keeps a slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Any) -> Tensor:
        ctx.axis, ctx.length = axis, x.shape[1]
        parts = [torch.empty_like(x) for _ in range(axis.size())]
        dist.all_gather(parts, x.contiguous(), group=axis.get_group())
        LEDGER.record("benchmark::gather", received=(len(parts) - 1) * x.numel() * 4)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad, n = grad.contiguous().clone(), ctx.axis.size()
        dist.all_reduce(grad, group=ctx.axis.get_group())
        # A ring reduces and then gathers: (n - 1) / n of the tensor twice.
        LEDGER.record("benchmark::reduce", received=2 * (n - 1) * grad.numel() // n * 4)
        return grad.narrow(1, ctx.axis.get_local_rank() * ctx.length, ctx.length), None


def _rows(measured: dict[Any, Measured], ranks: int) -> str:
    names = list(dict.fromkeys(key for key, _ in measured if key != "states"))
    steps = {key: max(measured[key, rank].step for rank in range(ranks)) for key in names}
    against = [steps[way, "HeadTail"] for way in ("gather all", "gather and sort")]
    rows = []
    for key in names:
        received = [max(measured[key, rank][way] for rank in range(ranks)) for way in (0, 1)]
        rows.append(
            [
                *key,
                *(f"{size / 1024:.1f}" for size in received),
                f"{1000 * steps[key]:.0f}",
                *(f"{steps[key] / other:.2f}" for other in against),
            ]
        )
    return table(HEAD, rows)


def _exchange_rows(measured: dict[Any, Any]) -> str:
    rows = [
        [
            f"{heads * 128 * 256 * 4 / MIB:.3g}",
            *(f"{1000 * t:.2f}" for t in measured["states", heads]),
        ]
        for heads in EXCHANGED_HEADS
    ]
    kinds = [f"{way}, {where}" for where in ("contiguous", "head-tail") for way in WAYS]
    return table(("MiB a summary", *kinds), rows)


def _by_formula(seq_len: int = 262_144) -> str:
    """MiB received a rank and layer, forward, of Qwen3.5-35B-A3B in bf16 with states in fp32."""
    config = PRESETS["qwen3.5-35b-a3b"]
    delta = config.delta
    state = DeltaShape(1, delta.value_heads, delta.key_dim, delta.value_dim).summary
    rows = []
    for n in (2, 4, 8, 16, 32, 64):
        hidden = seq_len // n * config.dim * 2
        moved = hidden * (1 - _kept(n))
        sizes = (
            summaries_received(n, 2, scan=False) * state,
            summaries_received(n, 2, scan=True) * state,
            summaries_received(n, 1, scan=True) * state,
            2 * moved + summaries_received(n, 1, scan=True) * state,
            2 * (n - 1) * hidden + summaries_received(n, 1, scan=False) * state,
        )
        rows.append([str(n), *(f"{size / MIB:.0f}" for size in sizes)])
    head = ("ranks", "gathered", "scanned", "scanned, contiguous", "relayout", "gather and sort")
    title = f"MiB received forward, one layer of qwen3.5-35b-a3b, S = {seq_len}, head-tail:"
    return f"{title}\n\n{table(head, rows)}"


def _kept(n: int) -> float:
    """Share of a head-tail shard that contiguous shards leave where it is, on the worst rank."""
    layouts = (HeadTail(2 * n, n), Contiguous(2 * n, n))
    held, wanted = ([set(x.token_indices(r).tolist()) for r in range(n)] for x in layouts)
    return min(len(a & b) for a, b in zip(held, wanted, strict=True)) / 2


def _summary_overhead(tokens: int = 131_072, heads: int = 32) -> str:
    """Time of the kernel with summaries over that without, forward, on this GPU."""
    make = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (
        torch.nn.functional.normalize(torch.randn(1, tokens, heads, 128, **make), dim=-1)
        for _ in range(3)
    )
    g, beta = -torch.rand(1, tokens, heads, device="cuda"), torch.rand(1, tokens, heads, **make)
    x = DeltaInputs(q, k, v, g, beta, torch.zeros(1, tokens, device="cuda", dtype=torch.int32))
    kernel = delta_kernel(x)
    times = []
    for carry in (None, lambda summary: torch.zeros_like(summary[..., 128:])):
        taken = []
        for _ in range(12):
            torch.cuda.synchronize()
            start = time.perf_counter()
            kernel.forward([x], carry)
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        times.append(statistics.median(taken[2:]))
    plain, with_summaries = times
    return (
        f"{tokens} tokens, {heads} heads of 128, bf16, forward: plain {1000 * plain:.2f} ms, with "
        f"summaries {1000 * with_summaries:.2f} ms, {with_summaries / plain - 1:+.1%}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", default="", help="hardware name of the file under results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
