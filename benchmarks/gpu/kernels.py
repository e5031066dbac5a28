"""Is every backend right on this card, forward and backward, for every kind of mask?

Truth is plain torch in fp64 on the same card, from the same rounded numbers. Errors are norms
relative to the truth's; `bound` is what rounding weights and results to the dtype may cost.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.errors import errors_by_name, within
from benchmarks.gpu.problems import Case, Heads, Problem, whole_problem
from dtcp.kernels.softmax.api import SavedForward, SoftmaxParams
from dtcp.kernels.softmax.backends import BACKENDS
from dtcp.kernels.softmax.reference import ReferenceAttention
from dtcp.kernels.softmax.types import GradAccumulators, OnlineSoftmax

LENGTH = 2000
WIDTHS = (128, 64, 256, 512)
"""The usual one first: what is not reached in the time is worth least."""
MASKS = ("causal", "full", "documents", "window", "images")
BOUND = 2.0**-7


class Truth(NamedTuple):
    """What is compared."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def cases(device: str, length: int = LENGTH) -> list[Case]:
    """Every backend but the reference, at every width, under every mask, and with a softcap."""
    wanted = [(mask, 0.0) for mask in MASKS] + [("causal", 30.0)]
    return [
        Case(
            f"{backend.name} {width} {mask}{' softcap' if softcap else ''}",
            _run(backend.name, Heads(4, 2, width), mask, softcap, device, length),
        )
        for width in WIDTHS
        for mask, softcap in wanted
        for backend in BACKENDS
        if backend.name != "reference"
    ]


def _run(name: str, heads: Heads, mask: str, softcap: float, device: str, length: int) -> Any:
    def run() -> dict[str, Any]:
        problem = whole_problem(mask, length, heads, device)
        params = SoftmaxParams(heads.width**-0.5, softcap, name)
        without = problem.without(params)
        if without is not None:
            return without
        sink = torch.linspace(-1, 1, heads.queries, device=device)
        errors = relative_errors(problem, params, sink)
        return {**errors, "right": within(errors, BOUND)}

    return run


def relative_errors(problem: Problem, params: SoftmaxParams, sink: Tensor) -> dict[str, float]:
    """Of out, lse and the gradients, against plain torch in fp64."""
    q, width = problem.queries.q, problem.keys.v.shape[-1]
    grad_out = torch.randn(
        (*q.shape[:-1], width),
        device=q.device,
        generator=torch.Generator(q.device).manual_seed(1),
    ).to(q.dtype)
    right = truth_of(problem, params, sink, grad_out)
    out, lse = problem.forward(params, sink)
    grads = problem.backward(SavedForward(grad_out, out, lse), params)
    return errors_by_name(Truth._fields, (out, lse, *grads), right)


def truth_of(
    problem: Problem, params: SoftmaxParams, sink: Tensor | None, grad_out: Tensor
) -> Truth:
    """Plain torch in fp64, from the same rounded numbers."""
    wide, truth = problem.to(torch.float64), ReferenceAttention()
    plain = SoftmaxParams(params.scale, params.softcap)
    state = OnlineSoftmax.empty(wide.queries.q, wide.keys.v.shape[-1])
    truth.attend(state, wide.queries, wide.keys, plain)
    out, lse = state.finish(None if sink is None else sink.double(), torch.float64)
    sums = GradAccumulators(*(torch.zeros_like(x) for x in (wide.queries.q, *wide.keys[:2])))
    saved = SavedForward(grad_out.double(), out, lse)
    truth.attend_backward(sums, saved, wide.queries, wide.keys, plain)
    return Truth(out, lse, *sums)
