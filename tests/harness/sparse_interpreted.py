"""Run sparse attention's kernels in Triton's interpreter against dense fp64, for tests.

Triton reads TRITON_INTERPRET when it is imported, so this script runs in a process of its own.
Prints the largest error of each result, divided by its largest value, and then what the self-test
of these kernels finds.
"""

import json
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.sparse.api import triton_kernel
from dtcp.kernels.sparse.indexer import top_entries
from dtcp.kernels.sparse.reference import ReferenceSparseAttention
from dtcp.kernels.sparse.self_test import SparseReads, fault_of_sparse
from dtcp.kernels.sparse.types import Sight
from dtcp.kernels.triton_support import triton_runs_on
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sparse.mixer import Compression, SparseMetadata
from dtcp.sparse.op import sparse_attention
from dtcp.sparse.style import rank_metadata
from dtcp.sparse_latent import SparseLatentAttention, SparseLatentCP
from tests.harness.interpreter import patch_language_once_a_launch

WINDOW = 5
FIRST_ROW = (9, 2, 20)
"""Documents with borders anywhere, one shorter than a window, then padding; a second row is one."""


class Case(NamedTuple):
    layout: SequenceLayout
    rank: int
    kind: Compression | None
    heads: int
    dim: int
    sink: bool
    raw_keys: bool = True
    value_dim: int | None = None  # channels of a key that are its value; None for all


HEAD_TAIL, LAST, ODD = (HeadTail(32, 2), 1), (Contiguous(32, 4), 3), (Contiguous(33, 3), 2)
CASES = {
    "window": Case(*LAST, None, heads=17, dim=16, sink=False),
    "runs": Case(*HEAD_TAIL, Compression(3), heads=5, dim=24, sink=True),
    "picks": Case(*HEAD_TAIL, Compression(1, selected=18), heads=17, dim=24, sink=True),
    "no raw keys": Case(
        *HEAD_TAIL, Compression(1, selected=7), heads=3, dim=24, sink=False, raw_keys=False
    ),
    "all picked": Case(*LAST, Compression(4, selected=9), heads=3, dim=8, sink=True),
    "latents": Case(
        *ODD,
        Compression(1, selected=18),
        heads=17,
        dim=24,
        sink=False,
        raw_keys=False,
        value_dim=19,
    ),
    "latents in runs": Case(*ODD, Compression(3), heads=3, dim=49, sink=True, value_dim=17),
}
"""Blocks have 16 rows and 16 keys, so 17 heads take two blocks, and so do 17 entries."""
WIDE = Case(
    *LAST, Compression(1, selected=7), heads=2, dim=576, sink=False, raw_keys=False, value_dim=512
)
"""The latents of DeepSeek-V3.2 with their rotary keys."""


def dense(
    q: Tensor,
    keys: Tensor,
    entries: Tensor,
    sink: Tensor,
    seen: Tensor,
    scale: float,
    value_dim: int,
) -> tuple[Tensor, Tensor]:
    """One softmax over all there is: out [B, L, H, V] and lse [B, L, H]."""
    everything = torch.cat((keys, entries), dim=1)
    scores = torch.einsum("blhd,bkd->blhk", q, everything) * scale
    scores = scores.masked_fill(~seen[:, :, None], -inf)
    scores = torch.cat((scores, sink[:, None].expand(*scores.shape[:3], 1)), dim=-1)
    weights = scores.softmax(-1).nan_to_num()[..., :-1]
    values = everything[..., :value_dim]
    return torch.einsum("blhk,bkd->blhd", weights, values), scores.logsumexp(-1)


def chosen_by_index(
    attn_metadata: SparseMetadata | Sight, number: int, generator: torch.Generator
) -> Tensor:
    """[B, L, number], selected by an indexer with one head."""
    (rows, queries), entries = attn_metadata.first.shape, attn_metadata.closing.shape[1]
    q, keys = (
        torch.randn(rows, n, 4, generator=generator, dtype=torch.float64)
        for n in (queries, entries)
    )
    seen = (
        attn_metadata.first,
        attn_metadata.last,
        attn_metadata.closing,
        attn_metadata.tiles,
        number,
    )
    return top_entries(q[:, :, None], torch.ones(rows, queries, 1).double(), keys, *seen)


def metadata_of(case: Case, coords: Coords) -> SparseMetadata | Sight:
    """Of compressed entries; without raw keys, of tokens that are entries by themselves."""
    if case.raw_keys:
        return rank_metadata(coords, case.layout, case.rank, WINDOW, case.kind)
    mixer = SparseLatentAttention()
    return SparseLatentCP().make_metadata(mixer, coords, case.layout, case.rank).sight


def predicate(first: Tensor, last: Tensor, position: Tensor) -> Tensor:
    return (position[:, None] >= first[..., None]) & (position[:, None] <= last[..., None])


def errors(case: Case) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    length, value_dim = case.layout.seq_len, case.value_dim or case.dim
    coords = Coords.of(Documents((FIRST_ROW, (length,)), length))
    attn_metadata = metadata_of(case, coords)
    (rows, queries), entries = attn_metadata.first.shape, attn_metadata.closing.shape[1]
    shape = (rows, queries, case.heads, case.dim)
    seen = predicate(
        attn_metadata.window_first,
        attn_metadata.last,
        attn_metadata.key_token_index.expand(rows, -1),
    )
    # A key may lie in one segment and in the next one's halo, too.
    segments = len(case.layout.segments(case.rank))
    number = [torch.arange(n) * segments // n for n in seen.shape[1:]]
    seen &= number[0][:, None] == number[1]
    in_sight, selected = (
        predicate(attn_metadata.first, attn_metadata.last, attn_metadata.closing),
        None,
    )
    if case.kind is not None and case.kind.selected is not None:
        selected = chosen_by_index(attn_metadata, min(case.kind.selected, entries), generator)
        picked = torch.zeros(rows, queries, entries + 1, dtype=torch.bool)
        picked.scatter_(2, selected.long().where(selected >= 0, entries), True)
        in_sight = picked[..., :-1]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    q, keys = random(*shape), random(rows, seen.shape[-1], case.dim)
    entry_rows, sink = random(rows, entries, case.dim), random(case.heads)
    # Channels adjacent, all else in another order: as a rotation may pass a gradient on.
    grad = random(case.heads, rows, queries, value_dim).detach().permute(1, 2, 0, 3)
    exact = [x.detach().double().requires_grad_() for x in (q, keys, entry_rows, sink)]
    nothing = torch.full((case.heads,), -inf, dtype=torch.float64)
    sees, scale = torch.cat((seen, in_sight), dim=2), case.dim**-0.5
    sinks = exact[3] if case.sink else nothing
    right, right_lse = dense(*exact[:3], sinks, sees, scale, value_dim)
    parts = (None if case.kind is None else entry_rows, selected, sink if case.sink else None)
    sight = attn_metadata if isinstance(attn_metadata, Sight) else attn_metadata.sight
    out = sparse_attention(q, keys, *parts, sight, scale=scale, value_dim=value_dim)
    _, lse = torch.ops.dtcp.sparse_attention(q, keys, *parts, list(sight), scale, value_dim)
    result = {"out": relative_error(out, right), "lse": relative_error(lse, right_lse)}
    names = ("q", "keys", "entries", "sink")
    ours = torch.autograd.grad(out, (q, keys, entry_rows, sink), grad, allow_unused=True)
    exact_grads = torch.autograd.grad(right, exact, grad.double(), allow_unused=True)
    for name, one, other in zip(names, ours, exact_grads, strict=True):
        if one is None or not one.numel():
            assert other is None or not other.any(), name
        else:
            result[f"d{name}"] = relative_error(one, other)
    return result


def relative_error(ours: Tensor, right: Tensor) -> float:
    blind = right == -inf
    assert torch.equal(ours == -inf, blind)
    error = (ours - right).masked_fill(blind, 0).detach()
    return float(error.abs().max() / right.detach().masked_fill(blind, 0).abs().max())


def main() -> None:
    assert triton_runs_on(torch.empty(0))
    patch_language_once_a_launch()
    cases = {**CASES, "published": WIDE}
    results = {name: errors(case) for name, case in cases.items()}
    print(json.dumps({f"{n}: {k}": v for n, case in results.items() for k, v in case.items()}))
    asked = (triton_kernel, ReferenceSparseAttention(), torch.float32, torch.device("cpu"), 16)
    faults = {
        f"{reads.value}, values of {value_dim}": fault_of_sparse(
            *asked, value_dim=value_dim, heads=3, reads=reads
        )
        for reads in SparseReads
        for value_dim in (16, 11)
    }
    print(json.dumps(faults))


if __name__ == "__main__":
    main()
