"""Are tensors of more than 2^31 numbers read and written to their end?

A kernel that counts its places in 32 bits wraps around there, without an error. Under a short
window the last queries and keys depend on few others, so the end of a row is held to fp64 alone.
"""

from typing import Any

import torch

from benchmarks.gpu.errors import errors_by_name, within
from benchmarks.gpu.kernels import BOUND, Truth, truth_of
from benchmarks.gpu.problems import Case, Heads, Problem, problem_of
from dtcp.kernels.softmax.api import Keys, SavedForward, SoftmaxParams
from dtcp.kernels.softmax.backends import BACKENDS
from dtcp.kernels.softmax.block_ranges import block_ranges

HEADS = Heads(32, 32, 128)
TOKENS = 2**31 // (HEADS.keys * HEADS.width) + 4096
WINDOW = 128


def cases(device: str, tokens: int = TOKENS, heads: Heads = HEADS) -> list[Case]:
    """Every backend that takes a window."""
    return [
        Case(f"{backend.name} window {tokens}", _run(backend.name, tokens, heads, device))
        for backend in BACKENDS
        if backend.name != "reference"
    ]


def _run(name: str, tokens: int, heads: Heads, device: str) -> Any:
    def run() -> dict[str, Any]:
        token = torch.arange(tokens, dtype=torch.int32)
        intervals = ((token - WINDOW + 1).clamp(min=0)[None], token[None])
        problem = problem_of(intervals, token, heads, device)
        params = SoftmaxParams(heads.width**-0.5, kernel=name)
        without = problem.without(params)
        if without is not None:
            return without
        out, lse = problem.forward(params)
        grad_out = torch.empty_like(out).normal_()
        dq, dk, dv = problem.backward(SavedForward(grad_out, out, lse), params)
        right = truth_of(_end(problem), params, None, grad_out[:, -WINDOW:])
        pairs = zip((out, lse, dq, dk, dv), right, strict=True)
        ends = [(ours[:, -WINDOW:], truth[:, -WINDOW:]) for ours, truth in pairs]
        errors = errors_by_name(Truth._fields, *zip(*ends, strict=True))
        return {**errors, "numbers": problem.queries.q.numel(), "right": within(errors, BOUND)}

    return run


def _end(problem: Problem) -> Problem:
    """The last queries, and all keys that these see: no others see the last of them."""
    queries, (k, v, index) = problem.queries, problem.keys[:3]
    q, first, last = (x[:, -WINDOW:] for x in queries[:3])
    index = index[-2 * WINDOW :]
    ranges = block_ranges(first.cpu(), last.cpu(), index.cpu())
    return problem._replace(
        queries=queries._replace(q=q, first_key=first, last_key=last),
        keys=Keys(k[:, -2 * WINDOW :], v[:, -2 * WINDOW :], index, ranges),
    )
