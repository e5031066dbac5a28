"""Queries that meet keys through the seam of the kernels, and what must come of it.

Attention is taken at kernels.attend, below the mixers: any queries, keys in parts, empty slots.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.softmax import reference as tiles
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
from dtcp.sequence.layout import HeadTail
from dtcp.sequence.masks import Coords
from tests.harness import packings as cases
from tests.harness import reference
from tests.harness.attention_parity import (
    CAUSAL,
    IMAGES_IN_WINDOW,
    PREFIX,
    WINDOW,
    Case,
    truth,
)

ONE_HEAD = {"heads": 1, "kv_heads": 1, "sink": False, "dtype": torch.float32}


class Meeting(NamedTuple):
    """Queries of a case, and the keys they meet, one part after another."""

    case: Case
    queries: Tensor
    parts: Sequence[Tensor]
    unused: int = 0  # slots behind each part's keys


def meetings() -> dict[str, Meeting]:
    """All widths of tile, both ends of runs, both ways through them."""
    causal = Case(CAUSAL, cases.one_document, seq_len=110, key_dim=16, value_dim=16, **ONE_HEAD)
    packed = replace(causal, packing=cases.two_rows, seq_len=44, softcap=2.0, scale=0.4)
    packed = replace(packed, heads=4, kv_heads=2, key_dim=24, value_dim=5)
    images = replace(causal, sight=IMAGES_IN_WINDOW, packing=cases.empty_row, seq_len=80)
    half = replace(causal, dtype=torch.float16, seq_len=200)
    found = {
        "causal": _whole(causal),
        "packed, capped, keys in two parts": Meeting(
            packed, torch.arange(44), [torch.arange(p, 44, 2) for p in (0, 1)]
        ),
        "images in windows, head-tail, unused slots": Meeting(
            images, HeadTail(80, 2).token_indices(0), [torch.arange(50)], unused=14
        ),
        "heads of 512": _whole(replace(causal, seq_len=20, key_dim=512, value_dim=500)),
        "half": _whole(half),
        "half, window": _whole(replace(half, sight=WINDOW, packing=cases.across_borders)),
        "prefix": _whole(replace(causal, sight=PREFIX, packing=cases.on_borders, seq_len=80)),
    }
    return found


def _whole(case: Case) -> Meeting:
    return Meeting(case, torch.arange(case.seq_len), [torch.arange(case.seq_len)])


class Found(NamedTuple):
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def expected(at: Meeting) -> tuple[Found, Tensor]:
    """The truth, with gradients of the queries met, and their cotangent."""
    case, inputs = at.case, truth(at.case, 4).inputs
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    visible = case.sight.visible(case.documents(4))
    met = torch.zeros(case.seq_len, dtype=torch.bool)
    met[torch.cat(list(at.parts))] = True
    out, lse = reference.attention(q, k, v, visible & met, scale=case.scale, softcap=case.softcap)
    out, lse = out[:, at.queries], lse[:, at.queries]
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    grad_out = grad_out.to(case.dtype)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad_out.double())
    return Found(out.detach(), lse.detach(), dq[:, at.queries], dk, dv), grad_out


def computed(at: Meeting, grad_out: Tensor, device: str) -> Found:
    """Every part's keys in turn, forward and then backward."""
    case = at.case
    q, k, v = (x.to(device, case.dtype) for x in truth(case, 4).inputs[:3])
    documents = case.documents(4)
    coords = Coords.of(
        documents, prefix=cases.prefix_of_tokens(documents), block=cases.blocks_of_tokens(documents)
    )
    first, last = (x[:, at.queries] for x in case.sight.mask.intervals(coords))
    queries = Queries.of(q[:, at.queries], first.to(device), last.to(device))
    how = SoftmaxParams(case.key_dim**-0.5 if case.scale is None else case.scale, case.softcap)
    parts = []
    for tokens in at.parts:
        token_index = torch.nn.functional.pad(tokens, (0, at.unused), value=UNUSED).to(torch.int32)
        slots = [_with_unused(x[:, tokens], at.unused) for x in (k, v)]
        parts.append((Keys(*slots, token_index.to(device)), block_ranges(first, last, token_index)))

    partial = OnlineSoftmax.empty(queries.q, case.value_dim)
    for keys, spans in parts:
        assert attention_kernel(queries, keys) is not tiles
        attend(partial, queries, keys, spans, how)
    out, lse = partial.finish(None, case.dtype)
    final = SavedForward(grad_out.to(device), out, lse)
    dq, dk, dv = (zeros_for(x) for x in (queries.q, k, v))
    for tokens, (keys, spans) in zip(at.parts, parts, strict=True):
        grads = GradAccumulators(dq, zeros_for(keys.k), zeros_for(keys.v))
        attend_backward(grads, final, queries, keys, spans, how)
        count = len(tokens)
        assert not grads.dk[:, count:].any() and not grads.dv[:, count:].any()
        dk[:, tokens], dv[:, tokens] = grads.dk[:, :count], grads.dv[:, :count]
    return Found(*(x.cpu() for x in (out, lse, dq, dk, dv)))


def _with_unused(x: Tensor, slots: int) -> Tensor:
    """Keys with empty slots behind, heads outermost in memory: kernels read any strides."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, slots))
    return padded.transpose(0, 2).contiguous().transpose(0, 2)


def check(at: Meeting, device: str = "cpu") -> dict[str, float]:
    """Error of each result."""
    right, grad_out = expected(at)
    found = computed(at, grad_out, device)
    blind = right.lse == -torch.inf
    assert torch.equal(found.lse == -torch.inf, blind) and not found.out[blind].any()
    pairs = zip(Found._fields, found, right, strict=True)
    return {name: far(a, b) for name, a, b in pairs}


def far(found: Tensor, right: Tensor) -> float:
    """The largest difference where the truth is finite, over its largest value."""
    finite = right.isfinite()
    found, right = found[finite].double(), right[finite]
    return float((found - right).abs().max() / right.abs().max())
