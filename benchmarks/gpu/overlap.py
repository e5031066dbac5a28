"""A profiler's trace of one ring step on two ranks that share the card.

Transfers go through host memory here, on a stream of their own: the trace shows copies beside the
attention kernels, and `beside` is the share of the copies' time during which a kernel ran.

    python -m torch.distributed.run --standalone --nproc-per-node 2 \\
        -m benchmarks.gpu.overlap cuda 65536
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.problems import Case
from benchmarks.gpu.processes import run_ranks
from benchmarks.gpu.wheels import add_packages
from dtcp import (
    Causal,
    Degrees,
    Documents,
    ParallelMesh,
    RingAttention,
    SoftmaxAttention,
    apply_plan,
    shard_batch,
)

SECONDS = 25.0
"""Less than the stage has after its start, so that ranks that hang get a line with their error."""
TRACE = Path("build/gpu/ring_trace.json")
Spans = Sequence[tuple[float, float]]


def cases(device: str, length: int = 65_536) -> list[Case]:
    """One step of a layer of 32 heads, forward and backward."""
    return [Case(f"ring of 2 ranks, {length} tokens", lambda: _launch(device, length))]


def _launch(device: str, length: int) -> dict[str, Any]:
    return run_ranks(2, "benchmarks.gpu.overlap", [device, str(length)], SECONDS)


def main(device: str, length: int) -> None:
    """One rank; rank 0 writes its trace and prints what it shows."""
    add_packages()
    if device == "cuda":
        torch.cuda.set_device(0)
        torch.cuda.init()
    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    mesh = ParallelMesh.from_degrees(Degrees(cp=n), device)
    model = torch.nn.ModuleDict({"mixer": SoftmaxAttention(Causal())})
    apply_plan(model, mesh.cp, {"mixer": RingAttention()})
    batch = {"input_ids": torch.zeros(1, length, dtype=torch.int64)}
    documents = Documents.single(1, length)
    _, sharded = shard_batch(batch, mesh, model=model, documents=documents, device=device)
    heads, dtype = ((32, 8), torch.bfloat16) if device == "cuda" else ((4, 2), torch.float32)
    q, k, v = (
        torch.randn(1, length // n, count, 128, device=device, dtype=dtype, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    )

    def step() -> None:
        out = model["mixer"](q, k, v, sharded.attn_metadata)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        if device == "cuda":
            torch.cuda.synchronize()

    step()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device == "cuda")]
    with profile(activities=activities) as profiler:
        step()
    if rank == 0:
        TRACE.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(TRACE))
        print(json.dumps(shown(json.loads(TRACE.read_text()))), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def shown(trace: dict[str, Any]) -> dict[str, Any]:
    """How long the trace's copies took, and during which share of that a kernel ran."""
    spans: dict[str, list[tuple[float, float]]] = {"gpu_memcpy": [], "kernel": []}
    for event in trace["traceEvents"]:
        if event.get("cat") in spans and "DtoD" not in event.get("name", ""):
            spans[event["cat"]].append((event["ts"], event["ts"] + event["dur"]))
    copies, kernels = (merged(each) for each in spans.values())
    took = sum(stop - start for start, stop in copies)
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in copies for b in kernels)
    return {
        "copies_ms": took / 1e3,
        "kernels_ms": sum(stop - start for start, stop in kernels) / 1e3,
        "beside": both / took if took else 0.0,
    }


def merged(spans: Spans) -> list[tuple[float, float]]:
    """The same time as spans that do not touch, ascending."""
    found: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
