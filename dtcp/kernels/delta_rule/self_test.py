"""A check of fla's kernels against the reference on the device they will run on: once.

Triton miscompiles some of them on some GPUs, without an error (flash-linear-attention issue 640).
It has the widths, heads and dtype that were asked for, so what it compiles and tunes is used later:
enough tokens that the autotuner's choice is good for long rows, too.

The delta rule and gated linear attention have one contract, and one check.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dtcp.kernels.delta_rule.types import Carry
from dtcp.kernels.faults import excess, fault_in, largest_error

TOKENS = 2048


class RecurrentKernel(Protocol):
    """A `DeltaKernel`, of inputs that may lack beta."""

    def forward(self, parts: Sequence[Any], carry: Carry | None) -> tuple[list[Tensor], Tensor]: ...

    def backward(
        self, parts: Sequence[Any], grads_out: Sequence[Tensor], state: Tensor, carry: Carry | None
    ) -> Sequence[Any]: ...


class Sizes(NamedTuple):
    """What a kernel is compiled for."""

    inputs: type
    """DeltaInputs or LinearInputs."""
    shapes: tuple[tuple[int, ...], ...]
    """Of one token, by input."""
    dtypes: tuple[torch.dtype, ...]
    device: torch.device

    @classmethod
    def of(cls, x: Any) -> "Sizes":
        shapes = tuple(tuple(part.shape[2:]) for part in x)
        return cls(type(x), shapes, tuple(part.dtype for part in x), x.v.device)


def fault_on_device(
    make_kernel: Callable[[Any], RecurrentKernel],
    make_reference: Callable[[], RecurrentKernel],
    x: Any,
) -> str | None:
    """What is wrong with the results of a kernel for such inputs, found at its first use.

    Args:
        make_kernel: of such inputs; a function of a module, as what is found is kept for it.
        x: DeltaInputs or LinearInputs on a GPU, of which shapes and dtypes are read.
    """
    return _fault(make_kernel, make_reference, Sizes.of(x))


@cache
def _fault(
    make_kernel: Callable[[Any], RecurrentKernel],
    make_reference: Callable[[], RecurrentKernel],
    sizes: Sizes,
) -> str | None:
    return fault_in_stretches(make_kernel, make_reference(), sizes)


def fault_in_stretches(
    make_kernel: Callable[[Any], RecurrentKernel],
    reference: RecurrentKernel,
    sizes: Sizes,
    *,
    tokens: int = TOKENS,
) -> str | None:
    """What is wrong with the results of a kernel, in a few words; None if they are right."""

    def check() -> str | None:
        x, grad, state = _problem(sizes, tokens)
        return excess("stretches", _errors(make_kernel(x), reference, x, grad, state))

    return fault_in(check, sizes.device)


def _errors(
    kernel: RecurrentKernel, reference: RecurrentKernel, x: Any, grad: Tensor, state: Tensor
) -> dict[str, float]:
    """Of out, the summaries that ranks exchange, and the gradients, by name."""
    ours, right = (results_of(each, x, grad, state) for each in (kernel, reference))
    return {name: largest_error(ours[name], right[name]) for name in right}


def results_of(kernel: RecurrentKernel, x: Any, grad: Tensor, state: Tensor) -> dict[str, Tensor]:
    """Of one part, by name: out, gradients, and the summaries that ranks exchange on both ways.

    A summary is two results: what is written to a state, and what becomes of the one that enters.
    """
    summaries: list[Tensor] = []

    def carry(summary: Tensor) -> Tensor:
        summaries.append(summary)
        return state

    (out,), _ = kernel.forward([x], carry)
    (grads,) = kernel.backward([x], [grad], state, carry)
    of_inputs = {f"d{name}": each for name, each in grads._asdict().items()}
    found = {"out": out, **of_inputs}
    for prefix, summary in zip(("", "d"), summaries, strict=True):
        through, written = summary.tensor_split((-x.v.shape[-1],), dim=-1)
        found |= {f"{prefix}transition": through, f"{prefix}summary": written}
    return found


def slowed(parts: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Noise as decays and writing strengths under which a state goes through so many tokens.

    A state that fades in one chunk would hide what is wrong with the chunks after it: here some
    tenths of it are left at the end, and so of what a summary says becomes of it.
    """
    slow = {"g": -F.softplus(parts["g"]) / tokens}
    if "beta" in parts:
        # Each token erases so much of one of the key's directions.
        least = min(1.0, 2 * parts["k"].shape[-1] / tokens)
        slow["beta"] = parts["beta"].sigmoid() * least
    return parts | slow


def _problem(sizes: Sizes, tokens: int) -> tuple[Any, Tensor, Tensor]:
    """Two stretches that end inside a chunk; a gradient of out, and states.

    The first goes on with a document, so that its summary says what it makes of a state.

    Of noise of its own: whoever draws next in a step, as a dropout does, draws what it always does.
    """
    device, tokens = sizes.device, tokens // 2 - 1
    noise = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(0))
    shapes = dict(zip(sizes.inputs._fields, sizes.shapes, strict=True))  # type: ignore[attr-defined]
    parts = {name: noise(2, tokens, *shape) for name, shape in shapes.items()}
    parts |= {name: F.normalize(parts[name], dim=-1) for name in ("q", "k")}
    parts = slowed(parts, tokens)
    parts["starts"] = torch.zeros(2, tokens, device=device)
    # A document of one token, and one behind it.
    parts["starts"][1, [tokens // 3, tokens // 3 + 1]] = 1
    given = (part.to(dtype) for part, dtype in zip(parts.values(), sizes.dtypes, strict=True))
    x = sizes.inputs(*given)
    (heads, value_dim), key_dim = shapes["v"], shapes["k"][1]
    grad = noise(*x.v.shape).to(x.v.dtype)
    return x, grad, noise(2, heads, key_dim, value_dim)
