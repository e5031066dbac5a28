"""TFLOP/s of every backend that can, forward and backward, and what our wrapper costs.

Work is 4 D operations per pair of a query and a key that the mask leaves, and head, forward, and
2.5 times that backward. torch's own attention and FlexAttention stand beside, in the same run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch._functorch import config as functorch_config
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu import problems
from benchmarks.gpu.latents import picked_latents
from benchmarks.gpu.problems import WINDOW, Case, Heads, whole_problem
from benchmarks.gpu.timing import host_seconds_of, seconds_of
from dtcp.kernels.softmax.api import SavedForward, SoftmaxParams
from dtcp.kernels.softmax.backends import BACKENDS
from dtcp.mixer_metadata import batch_metadata
from dtcp.sequence.documents import Documents
from dtcp.sequence.masks import Causal
from dtcp.softmax.mixer import SoftmaxAttention

HEADS = Heads(32, 8, 128)
LENGTHS = (8192, 32_768, 131_072)
MASKS = ("causal", "documents", "window", "full")


def cases(device: str, lengths: tuple[int, int, int] = LENGTHS) -> list[Case]:
    """What the targets are about first, then torch's own; whole rectangles of a long row last."""
    short, middle, long = lengths

    def backends(masks: Sequence[str], length: int) -> list[Case]:
        names = [backend.name for backend in BACKENDS if backend.name != "reference"]
        return [
            Case(f"{name} {mask} {length}", _backend(name, mask, length, device))
            for mask in masks
            for name in names
        ]

    def of_torch(length: int) -> list[Case]:
        found = [Case(f"torch sdpa causal {length}", _sdpa(length, device))]
        # Elsewhere FlexAttention has no backward.
        windows = (("causal", None), ("window", WINDOW)) if device == "cuda" else ()
        return found + [
            Case(f"torch flex_attention {mask} {length}", _flex(length, device, window))
            for mask, window in windows
        ]

    steps = [Case(f"wrapper at n = 1, causal {middle}", _wrapper(middle, device))]
    steps += [Case(f"picked latents {long}", picked_latents(device, long))]
    if device == "cuda":
        steps += [
            Case(f"host waits in a step, {mask} {short}", _host_waits(mask, short, device))
            for mask in ("causal", "documents", "window")
        ]
    return [
        *backends(("causal",), long),
        *steps,
        *backends(("documents", "window"), long),
        *of_torch(middle),
        *backends(MASKS, middle),
        *backends(MASKS, short),
        *of_torch(short),
        *backends(("full",), long),
    ]


def tflops(pairs: int, seconds: float, factor: float = 1.0) -> float:
    return factor * 4 * pairs * HEADS.queries * HEADS.width / seconds / 1e12


def _backend(name: str, mask: str, length: int, device: str) -> Any:
    def run() -> dict[str, Any]:
        problem = whole_problem(mask, length, HEADS, device)
        params = SoftmaxParams(HEADS.width**-0.5, kernel=name)
        without = problem.without(params)
        if without is not None:
            return without
        out, lse = problem.forward(params)
        saved = SavedForward(torch.randn_like(out), out, lse)
        forward = seconds_of(lambda: problem.forward(params), out.device)
        backward = seconds_of(lambda: problem.backward(saved, params), out.device)
        return {
            "forward_ms": 1e3 * forward,
            "backward_ms": 1e3 * backward,
            "forward_tflops": tflops(problem.pairs, forward),
            "backward_tflops": tflops(problem.pairs, backward, 2.5),
        }

    return run


def _heads_first(length: int, device: str) -> list[torch.Tensor]:
    problem = whole_problem("causal", length, HEADS, device)
    tensors = (problem.queries.q, problem.keys.k, problem.keys.v)
    return [x.transpose(1, 2).contiguous().requires_grad_() for x in tensors]


def _timed(call: Any, inputs: list[torch.Tensor], pairs: int) -> dict[str, Any]:
    out = call()
    grad_out = torch.randn_like(out)
    forward = seconds_of(call, out.device)
    backward = seconds_of(
        lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True), out.device
    )
    return {
        "forward_ms": 1e3 * forward,
        "backward_ms": 1e3 * backward,
        "forward_tflops": tflops(pairs, forward),
        "backward_tflops": tflops(pairs, backward, 2.5),
    }


def _sdpa(length: int, device: str) -> Any:
    def run() -> dict[str, Any]:
        q, k, v = _heads_first(length, device)
        call = lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
        return _timed(call, [q, k, v], length * (length + 1) // 2)

    return run


def _flex(length: int, device: str, window: int | None) -> Any:
    def run() -> dict[str, Any]:
        def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
            causal = key <= query
            return causal if window is None else causal & (query - key < window)

        mask = create_block_mask(seen, None, None, length, length, device=device)
        q, k, v = _heads_first(length, device)
        # One length, one graph: a second length would make torch compile for all of them.
        attend = torch.compile(flex_attention, dynamic=False)
        size = length if window is None else window
        pairs = size * (size + 1) // 2 + (length - size) * size
        # Its backward is timed several times, so it may not reuse what forward has saved.
        with functorch_config.patch(donated_buffer=False):
            return _timed(
                lambda: attend(q, k, v, block_mask=mask, enable_gqa=True), [q, k, v], pairs
            )

    return run


def _host_waits(mask: str, length: int, device: str) -> Any:
    """Whether a mixer's step, forward and backward, waits for the GPU once it is compiled."""

    def run() -> dict[str, Any]:
        problem = whole_problem(mask, length, HEADS, device)
        rule, documents = problems.MASKS[mask](length)
        mixer = SoftmaxAttention(rule)
        metadata = batch_metadata(mixer, documents).to(device)
        q, k, v = (x.detach().requires_grad_() for x in (problem.queries.q, *problem.keys[:2]))
        grad_out = torch.randn_like(q)
        torch.autograd.grad(mixer(q, k, v, metadata), (q, k, v), grad_out)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(mixer(q, k, v, metadata), (q, k, v), grad_out)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        return {"right": True}

    return run


def _wrapper(length: int, device: str) -> Any:
    """The mixer's whole step over the kernel's alone: what metadata, op and autograd add."""

    def run() -> dict[str, Any]:
        problem = whole_problem("causal", length, HEADS, device)
        params, mixer = SoftmaxParams(HEADS.width**-0.5), SoftmaxAttention(Causal())
        metadata = batch_metadata(mixer, Documents.single(1, length)).to(device)
        q, k, v = (x.detach().requires_grad_() for x in (problem.queries.q, *problem.keys[:2]))
        grad_out = torch.randn_like(q)

        def step() -> None:
            torch.autograd.grad(mixer(q, k, v, metadata), (q, k, v), grad_out)

        def kernel() -> None:
            out, lse = problem.forward(params)
            problem.backward(SavedForward(grad_out, out, lse), params)

        whole, alone = (seconds_of(call, q.device) for call in (step, kernel))
        host = host_seconds_of(step, q.device) if q.is_cuda else 0.0
        return {
            "mixer_ms": 1e3 * whole,
            "kernel_ms": 1e3 * alone,
            "overhead": whole / alone - 1,
            "host_ms": 1e3 * host,
        }

    return run
