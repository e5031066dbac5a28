"""A check of fla's kernels against the reference on the device they will run on: once.

Triton miscompiles some of them on some GPUs, without an error (flash-linear-attention issue 640).
It has the widths, heads and dtype that were asked for, so what it compiles and tunes is used later:
enough tokens that the autotuner's choice is good for long rows, too.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dtcp.kernels.delta_rule.types import DeltaInputs, DeltaKernel
from dtcp.kernels.faults import excess, fault_in, largest_error

TOKENS, SLOWER = 2048, 64


def fault_of_delta_rule(
    make_kernel: Callable[[], DeltaKernel],
    reference: DeltaKernel,
    like: DeltaInputs,
    *,
    tokens: int = TOKENS,
) -> str | None:
    """What is wrong with the results of a kernel, in a few words; None if they are right.

    Args:
        like: what it is asked for; only shapes, dtypes and the device are read.
    """

    def check() -> str | None:
        return excess("delta rule", _errors(make_kernel(), reference, like, tokens))

    return fault_in(check, like.v.device)


def _errors(
    kernel: DeltaKernel, reference: DeltaKernel, like: DeltaInputs, tokens: int
) -> dict[str, float]:
    """Of out, the summaries that ranks exchange, and the gradients, by name."""
    x, grad, state = _problem(like, tokens)
    ours, right = (_results(each, x, grad, state) for each in (kernel, reference))
    return {name: largest_error(ours[name], right[name]) for name in right}


def _results(kernel: DeltaKernel, x: DeltaInputs, grad: Tensor, state: Tensor) -> dict[str, Tensor]:
    summaries: list[Tensor] = []

    def carry(summary: Tensor) -> Tensor:
        summaries.append(summary)
        return state

    (out,), _ = kernel.forward([x], carry)
    (grads,) = kernel.backward([x], [grad], state, carry)
    of_inputs = {f"d{name}": each for name, each in grads._asdict().items()}
    return {"out": out, **of_inputs, **dict(zip(("summary", "dsummary"), summaries, strict=True))}


def _problem(like: DeltaInputs, tokens: int) -> tuple[DeltaInputs, Tensor, Tensor]:
    """One stretch of two documents that ends inside a chunk; a gradient of out, and a state."""
    device = like.v.device
    noise = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(0))
    tokens -= 1
    q, k = (F.normalize(noise(1, tokens, *x.shape[2:]), dim=-1) for x in (like.q, like.k))
    v, grad = (noise(1, tokens, *like.v.shape[2:]) for _ in range(2))
    # A state that fades in one chunk would hide what is wrong with the chunks after it.
    g = -F.softplus(noise(1, tokens, *like.g.shape[2:])) / SLOWER
    beta = noise(1, tokens, v.shape[2]).sigmoid()
    starts = torch.zeros(1, tokens, dtype=like.starts.dtype, device=device)
    starts[0, tokens // 3] = 1
    whole = DeltaInputs(q, k, v, g, beta, starts)
    given = (part.to(wanted.dtype) for part, wanted in zip(whole, like, strict=True))
    state = noise(1, v.shape[2], k.shape[3], v.shape[3])
    return DeltaInputs(*given), grad.to(like.v.dtype), state
