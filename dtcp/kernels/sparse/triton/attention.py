"""Sparse attention by Triton's kernels: the functions of sparse.py, on a GPU.

Backward is in three. Queries walk over their keys again and give dq; blocks of keys walk over
the queries that read them and give the gradients of keys, and of entries that are read in runs,
added up in one order. Only picked entries have no run of readers: their gradients are added in
fp32 as they come, by atomics, so two runs may differ in the last bits. Sorting the picks would
avoid that at a price: a reader brings all heads of q and of the gradient, 128 KiB at the sizes of
Flash, where an entry is one row of 1 KiB.

This module imports Triton, so sparse_op.py imports it where it is used.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtcp.kernels.sparse.reference import Gathered
from dtcp.kernels.sparse.triton.backward import (
    Final,
    pick_gradients,
    query_gradients,
    run_gradients,
)
from dtcp.kernels.sparse.triton.forward import (
    Given,
    Shape,
    Sizes,
    View,
    attend,
)

PROGRAMS = 512
"""Programs that keep a GPU busy; where keys are too few for that, their readers are split."""
LEAST_READERS = 16
"""Queries a split, at least."""


class Blocks(NamedTuple):
    """How a kernel is cut, and run: rows are queries times heads."""

    rows: int
    keys: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """The blocks of each pass."""

    forward: Blocks
    queries: Blocks
    keys: Blocks


def plan_for(dtype: torch.dtype, dim: int) -> Plan:
    """Blocks that fit where sparse_kernel says so; docs/log.md has their registers."""
    if dtype == torch.float32:
        return Plan(Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1))
    return Plan(Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2))


class Call(NamedTuple):
    """Operands as kernels take them."""

    given: Given
    sizes: Sizes
    batch: int
    dim: int
    has_sink: bool
    has_entries: bool
    has_picks: bool

    @classmethod
    def of(cls, q: Tensor, at: Gathered, sink: Tensor | None) -> "Call":
        keys, sight = at.keys.contiguous(), at.sight
        entries = keys[:, :0] if at.entries is None else at.entries.contiguous()
        number, runs = entries.shape[1], (sight.key_run, sight.entry_run, sight.closing)
        # An indexer that may pick as many as there are picks all that a query sees.
        has_picks = at.selected is not None and at.selected.shape[-1] < number
        selected = at.selected.contiguous() if at.selected is not None else sight.closing
        batch, length, heads, dim = q.shape
        return cls(
            Given(keys, entries, selected, *runs),
            Sizes(length, heads, keys.shape[1], number, selected.shape[-1] if has_picks else 0),
            batch,
            dim,
            sink is not None,
            number > 0,
            has_picks,
        )

    def shape(self, block: Blocks, *, dtype: torch.dtype, picks: bool) -> Shape:
        """What a kernel is compiled for; a block reads the picks of one query."""
        heads = block.rows if picks else min(block.rows, triton.next_power_of_2(self.sizes.heads))
        channels = max(16, triton.next_power_of_2(self.dim))
        # fp32 as three products of tensor cores, which keep its digits but for the last.
        precision = "tf32x3" if dtype == torch.float32 else "ieee"
        reads = (self.has_sink, self.has_entries, self.has_picks)
        cut = (heads, block.rows, block.keys, self.dim, channels)
        return Shape(*(tl.constexpr(x) for x in (*cut, *reads, precision)))

    def grid(self, shape: Shape) -> tuple[int, int]:
        """Blocks of rows, and rows of the batch."""
        heads, queries = shape.heads.value, shape.rows.value // shape.heads.value
        blocks = triton.cdiv(self.sizes.queries, queries) * triton.cdiv(self.sizes.heads, heads)
        return blocks, self.batch


def sparse_forward(
    q: Tensor, given: Gathered, sink: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend all queries: out [B, L, H, D] in q's dtype, and lse [B, L, H]."""
    call, block = Call.of(q, given, sink), plan_for(q.dtype, q.shape[-1]).forward
    shape = call.shape(block, dtype=q.dtype, picks=call.has_picks)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        attend[call.grid(shape)](
            View.of(q),
            lse if sink is None else sink.float().contiguous(),
            call.given,
            out,
            lse,
            call.sizes,
            scale,
            shape,
            num_warps=block.warps,
            num_stages=block.stages,
        )
    return out, lse


def sparse_backward(
    grad_out: Tensor,
    q: Tensor,
    given: Gathered,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, keys, entries and sink; of keys and entries in fp32."""
    call, plan = Call.of(q, given, sink), plan_for(q.dtype, q.shape[-1])
    shape = call.shape(plan.queries, dtype=q.dtype, picks=call.has_picks)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    final = Final(View.of(q), View.of(grad_out), lse, torch.empty_like(lse))
    with torch.cuda.device_of(q):
        query_gradients[call.grid(shape)](
            final,
            out.contiguous(),
            call.given,
            dq,
            call.sizes,
            scale,
            shape,
            num_warps=plan.queries.warps,
            num_stages=plan.queries.stages,
        )
        dkeys = _run_gradients(final, call, given.sight.key_readers, call.given.keys, scale)
        dentries = None if given.entries is None else _entry_gradients(final, call, given, scale)
    dsink = None
    if sink is not None:
        dsink = -(torch.exp(sink.float() - lse) * final.delta).sum((0, 1)).to(sink.dtype)
    return dq, dkeys, dentries, dsink


def _entry_gradients(final: Final, call: Call, given: Gathered, scale: float) -> Tensor:
    """[B, P, D] fp32."""
    entries = call.given.entries
    if not call.has_picks:
        return _run_gradients(final, call, given.sight.entry_readers, entries, scale)
    found = torch.zeros(entries.shape, dtype=torch.float32, device=entries.device)
    block = plan_for(entries.dtype, call.dim).keys
    blocks = triton.cdiv(call.sizes.picks, block.keys)
    pick_gradients[call.sizes.queries, blocks, call.batch](
        final,
        call.given,
        found,
        call.sizes,
        scale,
        call.shape(block, dtype=entries.dtype, picks=True),
        num_warps=block.warps,
        num_stages=block.stages,
    )
    return found


def _run_gradients(final: Final, call: Call, readers: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Gradient of keys, or of entries, that are read in runs: [B, K, D] fp32."""
    batch, number, dim = keys.shape
    block = plan_for(keys.dtype, dim).keys
    blocks = triton.cdiv(number, block.keys)
    most = call.sizes.queries // LEAST_READERS
    splits = max(1, min(PROGRAMS // max(1, blocks * batch), most))
    found = torch.empty((splits, *keys.shape), dtype=torch.float32, device=keys.device)
    if number > 0:
        run_gradients[blocks, splits, batch](
            final,
            keys,
            readers,
            found,
            call.sizes._replace(keys=number),
            scale,
            call.shape(block, dtype=keys.dtype, picks=False),
            num_warps=block.warps,
            num_stages=block.stages,
        )
    return found.sum(0) if splits > 1 else found[0]
