"""How fast the attention kernels are on one device, at one rank's share: for attention.py.

A rank's own tokens against themselves, as in a ring's first step, bf16: forward merges into a
partial result, backward adds to sums in fp32, both as every strategy calls them. Operations are
those of the pairs that the mask leaves, 2 (D + V) a pair and head forward, and 2.5 times that
backward. The kernels are held against plain torch's first, at 512 tokens.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.report import conditions, table, write
from dtcp.kernels.softmax import reference as tiles
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
from dtcp.sequence.documents import Documents
from dtcp.sequence.masks import (
    Causal,
    Coords,
    Mask,
    SlidingWindow,
)

WINDOW = 1024
LENGTHS = (8192, 32_768, 131_072)
HEADS = ((128, 32, 8), (256, 16, 4), (512, 8, 2))
"""(head dim, heads, kv heads)"""
CLOSE = 2e-2
HEAD = ("head dim", "heads", "tokens", "mask", "fwd ms", "fwd TFLOP/s", "bwd ms", "bwd TFLOP/s")


class Problem(NamedTuple):
    """One call's arguments, and the pairs of a query and a key it sees."""

    queries: Queries
    keys: Keys
    spans: Tensor
    how: SoftmaxParams
    pairs: int


def main(device: str, repeats: int, name: str) -> None:
    """Measure and print the table."""
    given = {"device": device, "repeats": repeats}
    text = f"{conditions('benchmarks.attention', given)}\n\n{measure(device, repeats)}\n"
    print(text)
    if name:
        write(Path(__file__).parent / "results", f"attention_{name}", text)


def measure(
    device: str,
    repeats: int,
    lengths: Sequence[int] = LENGTHS,
    heads: Sequence[tuple[int, int, int]] = HEADS,
) -> str:
    """The table, by head dim, length and mask."""
    rows = []
    for dim, count, groups in heads:
        for mask, said in ((Causal(), "causal"), (Causal() & SlidingWindow(WINDOW), "window")):
            _check(_problem(512, dim, count, groups, mask, device))
            for length in lengths:
                at = _problem(length, dim, count, groups, mask, device)
                row = [f"{dim}", f"{count} / {groups}", f"{length}", said]
                rows.append(row + _numbers(at, repeats))
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
        Keys(k, v, token_index.to(device)),
        block_ranges(first, last, token_index),
        SoftmaxParams(dim**-0.5),
        int((last - first + 1).sum()),
    )


def _forward(at: Problem, kernel: AttentionKernel) -> OnlineSoftmax:
    partial = OnlineSoftmax.empty(at.queries.q, at.keys.v.shape[-1])
    kernel.attend(partial, at.queries, at.keys, at.spans, at.how)
    return partial


def _backward(at: Problem, kernel: AttentionKernel, final: SavedForward) -> GradAccumulators:
    grads = GradAccumulators(*(zeros_for(x) for x in (at.queries.q, at.keys.k, at.keys.v)))
    kernel.attend_backward(grads, final, at.queries, at.keys, at.spans, at.how)
    return grads


def _final(partial: OnlineSoftmax, at: Problem) -> SavedForward:
    out, lse = partial.finish(None, at.queries.q.dtype)
    return SavedForward(torch.randn_like(out), out, lse)


def _check(at: Problem) -> None:
    """The kernels' results against plain torch's, from the same rounded inputs."""
    kernel = attention_kernel(at.queries, at.keys)
    found, right = _forward(at, kernel), _forward(at, tiles)
    final = _final(right, at)
    results = (*found, *_backward(at, kernel, final))
    for a, b in zip(results, (*right, *_backward(at, tiles, final)), strict=True):
        error = float((a - b).abs().max() / b.abs().max())
        if not error <= CLOSE:
            raise ValueError(
                f"A kernel is timed if it is right, got error={error:.1e} with "
                f"heads of {at.queries.q.shape[-1]}: run python -m pytest -m gpu."
            )


def _numbers(at: Problem, repeats: int) -> list[str]:
    """Milliseconds and TFLOP/s, forward and backward."""
    kernel, q = attention_kernel(at.queries, at.keys), at.queries.q
    final = _final(_forward(at, kernel), at)
    work = 2 * at.pairs * q.shape[2] * (q.shape[-1] + at.keys.v.shape[-1])
    forward = _seconds(lambda: _forward(at, kernel), repeats, q.device)
    backward = _seconds(lambda: _backward(at, kernel, final), repeats, q.device)
    cells = []
    for seconds, operations in ((forward, work), (backward, 2.5 * work)):
        cells += [f"{1e3 * seconds:.2f}", f"{operations / seconds / 1e12:.1f}"]
    return cells


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median, after two calls that compile and warm up."""
    taken = []
    for _ in range(repeats + 2):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
