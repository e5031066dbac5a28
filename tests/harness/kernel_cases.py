"""Cases for attention kernels, and their errors against the reference in fp64.

They call `dtcp.kernels.softmax.api.attend`, below the mixers: with any queries, with keys in
several parts, and with empty slots behind the keys.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.softmax.api import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
    attend,
    attend_backward,
    attention_kernel,
    zeros_for,
)
from dtcp.kernels.softmax.block_ranges import UNUSED, block_ranges
from dtcp.sequence.coords import Coords
from dtcp.sequence.layout import HeadTail
from tests.harness import packings, reference
from tests.harness.attention_parity import CAUSAL, IMAGES_IN_WINDOW, PREFIX, WINDOW, Case, truth

ONE_HEAD = {"heads": 1, "kv_heads": 1, "sink": False, "dtype": torch.float32}


class KernelCase(NamedTuple):
    """Queries of a case, and the keys they attend to, one part after another."""

    case: Case
    queries: Tensor
    parts: Sequence[Tensor]
    unused: int = 0  # empty slots behind each part's keys


def kernel_cases() -> dict[str, KernelCase]:
    """Every width of tile, partial blocks at both ends of a range, with full blocks and without."""
    causal = Case(CAUSAL, packings.one_document, seq_len=110, key_dim=16, value_dim=16, **ONE_HEAD)
    packed = replace(causal, packing=packings.two_rows, seq_len=44, softcap=2.0, scale=0.4)
    packed = replace(packed, heads=4, kv_heads=2, key_dim=24, value_dim=5)
    images = replace(causal, mask_case=IMAGES_IN_WINDOW, packing=packings.empty_row, seq_len=80)
    half = replace(causal, dtype=torch.float16, seq_len=200)
    return {
        "causal": _whole(causal),
        "packed, capped, keys in two parts": KernelCase(
            packed, torch.arange(44), [torch.arange(p, 44, 2) for p in (0, 1)]
        ),
        "images in windows, head-tail, unused slots": KernelCase(
            images, HeadTail(80, 2).token_indices(0), [torch.arange(50)], unused=14
        ),
        "heads of 512": _whole(replace(causal, seq_len=20, key_dim=512, value_dim=500)),
        "half": _whole(half),
        "half, window": _whole(replace(half, mask_case=WINDOW, packing=packings.across_borders)),
        "prefix": _whole(
            replace(causal, mask_case=PREFIX, packing=packings.on_borders, seq_len=80)
        ),
    }


def _whole(case: Case) -> KernelCase:
    return KernelCase(case, torch.arange(case.seq_len), [torch.arange(case.seq_len)])


class Results(NamedTuple):
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def expected(case: KernelCase) -> tuple[Results, Tensor]:
    """The truth in fp64, and the gradient of the output it is for."""
    base, inputs = case.case, truth(case.case, 4).inputs
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    visible = base.mask_case.visible(base.documents(4))
    present = torch.zeros(base.seq_len, dtype=torch.bool)
    present[torch.cat(list(case.parts))] = True
    scores = {"scale": base.scale, "softcap": base.softcap}
    out, lse = reference.attention(q, k, v, visible & present, **scores)
    out, lse = out[:, case.queries], lse[:, case.queries]
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    grad_out = grad_out.to(base.dtype)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad_out.double())
    return Results(out.detach(), lse.detach(), dq[:, case.queries], dk, dv), grad_out


def computed(case: KernelCase, grad_out: Tensor, device: str) -> Results:
    """Forward over every part's keys in turn, then backward."""
    base = case.case
    q, k, v = (x.to(device, base.dtype) for x in truth(base, 4).inputs[:3])
    documents = base.documents(4)
    coords = Coords.of(
        documents,
        prefix=packings.prefix_of_tokens(documents),
        block=packings.blocks_of_tokens(documents),
    )
    first, last = (x[:, case.queries] for x in base.mask_case.mask.intervals(coords))
    queries = Queries.of(q[:, case.queries], first.to(device), last.to(device))
    scale = base.key_dim**-0.5 if base.scale is None else base.scale
    params = SoftmaxParams(scale, base.softcap, "triton")
    parts = []
    for tokens in case.parts:
        token_index = torch.nn.functional.pad(tokens, (0, case.unused), value=UNUSED)
        token_index = token_index.to(torch.int32)
        slots = [_with_unused(x[:, tokens], case.unused) for x in (k, v)]
        ranges = block_ranges(first, last, token_index)
        parts.append(Keys(*slots, token_index.to(device), ranges))

    state = OnlineSoftmax.empty(queries.q, base.value_dim)
    for keys in parts:
        assert type(attention_kernel(queries, keys, params)).__name__ == "TritonAttention"
        attend(state, queries, keys, params)
    out, lse = state.finish(None, base.dtype)
    saved = SavedForward(grad_out.to(device), out, lse)
    dq, dk, dv = (zeros_for(x) for x in (queries.q, k, v))
    for tokens, keys in zip(case.parts, parts, strict=True):
        grads = GradAccumulators(dq, zeros_for(keys.k), zeros_for(keys.v))
        attend_backward(grads, saved, queries, keys, params)
        count = len(tokens)
        assert not grads.dk[:, count:].any() and not grads.dv[:, count:].any()
        dk[:, tokens], dv[:, tokens] = grads.dk[:, :count], grads.dv[:, :count]
    return Results(*(x.cpu() for x in (out, lse, dq, dk, dv)))


def _with_unused(x: Tensor, slots: int) -> Tensor:
    """Keys with empty slots behind, heads outermost in memory: kernels read any strides."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, slots))
    return padded.transpose(0, 2).contiguous().transpose(0, 2)


def kernel_errors(case: KernelCase, device: str = "cpu") -> dict[str, float]:
    """The relative error of each result."""
    right, grad_out = expected(case)
    ours = computed(case, grad_out, device)
    blind = right.lse == -torch.inf
    assert torch.equal(ours.lse == -torch.inf, blind) and not ours.out[blind].any()
    pairs = zip(Results._fields, ours, right, strict=True)
    return {name: relative_error(a, b) for name, a, b in pairs}


def relative_error(ours: Tensor, right: Tensor) -> float:
    """The largest difference where the truth is finite, divided by the truth's largest value."""
    finite = right.isfinite()
    ours, right = ours[finite].double(), right[finite]
    return float((ours - right).abs().max() / right.abs().max())
