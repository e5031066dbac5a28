"""A check of a sparse backend against the reference on the device it will run on: once."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dtcp.kernels.softmax.self_test import BOUND, kernel_failures
from dtcp.kernels.sparse.types import Sight, SparseKernel, SparseKeys

QUERIES, WINDOW, ENTRIES, SELECTED, HEADS = 96, 24, 200, 100, 64


def fault_of_sparse(
    make_kernel: Callable[[], SparseKernel],
    reference: SparseKernel,
    dtype: torch.dtype,
    device: torch.device,
    width: int,
) -> str | None:
    """What is wrong with the results of a kernel, in a few words; None if they are right."""
    mode = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    try:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(0)
        wrong = _largest_error(make_kernel(), reference, dtype, device, width)
        if not wrong <= BOUND:
            return f"failed its self-test (an error of {wrong:.1e})"
    except kernel_failures() as error:
        text = str(error).strip().splitlines() or [""]
        return f"failed its self-test ({type(error).__name__}: {text[0][:200]})"
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)
    return None


def sparse_problem(
    dtype: torch.dtype, device: torch.device, width: int
) -> tuple[Tensor, SparseKeys, Tensor]:
    """q, what it reads, and sinks: windows of raw keys, and every other entry selected."""
    generator = torch.Generator(device).manual_seed(0)
    noise = partial(torch.randn, generator=generator, device=device)
    query = torch.arange(QUERIES, dtype=torch.int32)[None]
    run = torch.stack(((query - WINDOW + 1).clamp(min=0), query + 1), dim=-1)
    nothing = torch.zeros(1, QUERIES, 2, dtype=torch.int32)
    zeros = torch.zeros(1, QUERIES, dtype=torch.int32)
    every = torch.tensor([0, ENTRIES], dtype=torch.int32).expand(1, QUERIES, 2)
    tiles = torch.tensor([[[0, QUERIES, 0, QUERIES, 0, ENTRIES]]])
    on_device = (
        x.to(device)
        for x in (
            run[..., 0],
            zeros,
            query,
            query[0],
            torch.zeros(1, ENTRIES, dtype=torch.int32),
            run,
            nothing,
            every,
            nothing,
        )
    )
    sight = Sight._make((*on_device, tiles))
    places = torch.arange(0, ENTRIES, 2, dtype=torch.int32, device=device)[:SELECTED]
    selected = places.expand(1, QUERIES, SELECTED).clone()
    # Some select fewer.
    selected[:, ::3, SELECTED // 2 :] = -1
    q, keys, entries = (
        noise(*shape).to(dtype)
        for shape in (
            (1, QUERIES, HEADS, width),
            (1, QUERIES, width),
            (1, ENTRIES, width),
        )
    )
    return q, SparseKeys(keys, entries, selected, sight), noise(HEADS)


def _largest_error(
    kernel: SparseKernel,
    truth: SparseKernel,
    dtype: torch.dtype,
    device: torch.device,
    width: int,
) -> float:
    q, keys, sink = sparse_problem(dtype, device, width)
    scale = width**-0.5
    right_out, right_lse = truth.forward(q, keys, sink, scale)
    generator = torch.Generator(device).manual_seed(1)
    grad_out = torch.randn(q.shape, generator=generator, device=device).to(dtype)
    saved = (grad_out, q, keys, sink, right_out, right_lse, scale)
    out, lse = kernel.forward(q, keys, sink, scale)
    ours, right = kernel.backward(*saved), truth.backward(*saved)
    pairs = [(out, right_out), (lse, right_lse)]
    pairs += [(ours.q, right.q), (ours.keys, right.keys)]
    for a, b in ((ours.entries, right.entries), (ours.sink, right.sink)):
        if a is not None and b is not None:
            pairs.append((a, b))
    errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in pairs]
    return float("nan") if any(error != error for error in errors) else max(errors)
