"""How fast the attention kernels are on one device, at the size of one rank: for attention.py.

A rank's own tokens against themselves, as in the first step of a ring, in bf16: forward merges
into an online softmax, backward adds to sums in fp32, both as every strategy calls them. Only
pairs that the mask leaves count as work, 2 (D + V) operations per pair and head forward, and 2.5
times that backward. At 512 tokens the kernels are first compared with plain torch.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from benchmarks.report import conditions, publish, table
from dtcp.kernels.softmax.api import (
    AttentionKernel,
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
    attention_kernel,
    zeros_for,
)
from dtcp.kernels.softmax.block_ranges import block_ranges
from dtcp.kernels.softmax.reference import ReferenceAttention
from dtcp.sequence.documents import Documents
from dtcp.sequence.masks import Causal, Coords, Mask, SlidingWindow

WINDOW = 1024
LENGTHS = (8192, 32_768, 131_072)
HEADS = ((128, 32, 8), (256, 16, 4), (512, 8, 2))
"""(head dim, heads, kv heads)"""
CLOSE = 2e-2
HEAD = ("head dim", "heads", "tokens", "mask", "fwd ms", "fwd TFLOP/s", "bwd ms", "bwd TFLOP/s")


class Problem(NamedTuple):
    """The arguments of a call, and how many pairs of a query and a key the mask leaves."""

    queries: Queries
    keys: Keys
    params: SoftmaxParams
    pairs: int


def main(device: str, repeats: int, name: str) -> None:
    """Measure and print the table."""
    settings = {"device": device, "repeats": repeats}
    text = f"{conditions('benchmarks.attention', settings)}\n\n{measure(device, repeats)}\n"
    publish("attention", name, text)


def measure(
    device: str,
    repeats: int,
    lengths: Sequence[int] = LENGTHS,
    heads: Sequence[tuple[int, int, int]] = HEADS,
) -> str:
    """The table, by head dim, length and mask."""
    rows = []
    for dim, count, groups in heads:
        for mask, mask_name in ((Causal(), "causal"), (Causal() & SlidingWindow(WINDOW), "window")):
            _check(_problem(512, dim, count, groups, mask, device))
            for length in lengths:
                problem = _problem(length, dim, count, groups, mask, device)
                row = [f"{dim}", f"{count} / {groups}", f"{length}", mask_name]
                rows.append(row + _numbers(problem, repeats))
    return table(HEAD, rows)


def _problem(length: int, dim: int, heads: int, groups: int, mask: Mask, device: str) -> Problem:
    first, last = mask.intervals(Coords.of(Documents.single(1, length)))
    token_index = torch.arange(length, dtype=torch.int32)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, length, count, dim, device=device, dtype=torch.bfloat16)
        for count in (heads, groups, groups)
    )
    return Problem(
        Queries.of(q, first.to(device), last.to(device)),
        Keys(k, v, token_index.to(device), block_ranges(first, last, token_index)),
        SoftmaxParams(dim**-0.5),
        int((last - first + 1).sum()),
    )


def _forward(problem: Problem, kernel: AttentionKernel) -> OnlineSoftmax:
    state = OnlineSoftmax.empty(problem.queries.q, problem.keys.v.shape[-1])
    kernel.attend(state, *problem[:3])
    return state


def _backward(problem: Problem, kernel: AttentionKernel, saved: SavedForward) -> GradAccumulators:
    grads = GradAccumulators(
        *(zeros_for(x) for x in (problem.queries.q, problem.keys.k, problem.keys.v))
    )
    kernel.attend_backward(grads, saved, *problem[:3])
    return grads


def _saved(state: OnlineSoftmax, problem: Problem) -> SavedForward:
    out, lse = state.finish(None, problem.queries.q.dtype)
    return SavedForward(torch.randn_like(out), out, lse)


def _check(problem: Problem) -> None:
    """Compare the kernels' results with plain torch's, from the same rounded inputs."""
    kernel = attention_kernel(problem.queries, problem.keys)
    plain = ReferenceAttention()
    ours, right = _forward(problem, kernel), _forward(problem, plain)
    saved = _saved(right, problem)
    results = (*ours, *_backward(problem, kernel, saved))
    for a, b in zip(results, (*right, *_backward(problem, plain, saved)), strict=True):
        error = float((a - b).abs().max() / b.abs().max())
        if not error <= CLOSE:
            raise ValueError(
                f"A kernel is timed if it is right, got error={error:.1e} with "
                f"heads of {problem.queries.q.shape[-1]}: run python -m pytest -m gpu."
            )


def _numbers(problem: Problem, repeats: int) -> list[str]:
    """Milliseconds and TFLOP/s, forward and backward."""
    kernel, q = attention_kernel(problem.queries, problem.keys), problem.queries.q
    saved = _saved(_forward(problem, kernel), problem)
    work = 2 * problem.pairs * q.shape[2] * (q.shape[-1] + problem.keys.v.shape[-1])
    forward = _seconds(lambda: _forward(problem, kernel), repeats, q.device)
    backward = _seconds(lambda: _backward(problem, kernel, saved), repeats, q.device)
    cells = []
    for seconds, operations in ((forward, work), (backward, 2.5 * work)):
        cells += [f"{1e3 * seconds:.2f}", f"{operations / seconds / 1e12:.1f}"]
    return cells


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median, after two calls that compile and warm up."""
    times = []
    for _ in range(repeats + 2):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
