"""Sparse attention by Triton's kernels.

Backward has three parts. Queries walk over their keys again, which gives dq. Blocks of keys walk
over the queries that read them, which gives the gradients of keys, and of entries that are read
in runs, summed in one order. Only selected entries have no run of readers: their gradients are
added in fp32 by atomics as they come, so two runs of a program may differ in the last bits.
Sorting the selection would avoid that at a price: each reader loads all heads of q and of the
gradient, 128 KiB at the sizes of DeepSeek-V4-Flash, where an entry is one row of 1 KiB.

This module imports Triton, so api.py imports it only where it is used.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtcp.kernels.softmax.merge import sink_gradient_of
from dtcp.kernels.sparse.blocks import BlockConfig, Columns, SparseBlocks, sparse_fit
from dtcp.kernels.sparse.triton.backward import (
    SavedOperands,
    selected_gradient_kernel,
    sparse_key_gradient_kernel,
    sparse_query_gradient_kernel,
)
from dtcp.kernels.sparse.triton.forward import (
    BlockShape,
    SparseOperands,
    SparseSizes,
    head_rows,
    sparse_forward_kernel,
)
from dtcp.kernels.sparse.types import SparseGradients, SparseKeys

PROGRAMS = 512
"""Programs that keep a GPU busy; where there are too few blocks of keys, readers are split."""
LEAST_READERS = 16
"""Queries per split, at least."""


class SparseLaunch(NamedTuple):
    """The inputs of a call as kernels take them."""

    operands: SparseOperands
    sizes: SparseSizes
    blocks: SparseBlocks
    batch: int
    dim: int
    value_dim: int
    has_sink: bool
    has_entries: bool
    has_selection: bool

    @classmethod
    def of(cls, q: Tensor, keys: SparseKeys, sink: Tensor | None) -> "SparseLaunch":
        raw, sight = keys.keys.contiguous(), keys.sight
        entries = raw[:, :0] if keys.entries is None else keys.entries.contiguous()
        number, runs = entries.shape[1], (sight.key_run, sight.entry_run, sight.closing)
        # An indexer that may select as many entries as there are selects all that a query sees.
        has_selection = keys.selected is not None and keys.selected.shape[-1] < number
        selected = sight.closing if keys.selected is None else keys.selected.contiguous()
        num_selected = selected.shape[-1] if has_selection else 0
        batch, length, heads, dim = q.shape
        fit = sparse_fit(q, keys.value_dim)
        assert fit is not None, "api.py leaves what does not fit to plain torch"
        return cls(
            SparseOperands(raw, entries, selected, *runs),
            SparseSizes(length, heads, raw.shape[1], number, num_selected),
            fit.blocks,
            batch,
            dim,
            keys.value_dim,
            sink is not None,
            number > 0,
            has_selection,
        )

    def shape(self, block: BlockConfig, *, dtype: torch.dtype, selection: bool) -> BlockShape:
        """What a kernel is compiled for; with a selection, a block of rows is of one query."""
        heads = min(block.rows, triton.next_power_of_2(self.sizes.heads))
        heads = block.rows if selection else heads
        # fp32 as three products on tensor cores, which keep all of its digits but the last.
        precision = "tf32x3" if dtype == torch.float32 else "ieee"
        reads = (self.has_sink, self.has_entries, self.has_selection)
        columns = Columns.of(self.dim, self.value_dim)
        sizes = (heads, block.rows, block.keys, self.dim, self.value_dim, *columns)
        return BlockShape(*(tl.constexpr(x) for x in (*sizes, *reads, precision)))

    def grid(self, shape: BlockShape) -> tuple[int, int]:
        """Blocks of rows, and rows of the batch."""
        heads, queries = shape.heads.value, shape.rows.value // shape.heads.value
        blocks = triton.cdiv(self.sizes.queries, queries) * triton.cdiv(self.sizes.heads, heads)
        return blocks, self.batch


class TritonSparseAttention:
    """`SparseKernel` for the tensors that `triton_runs_on` accepts."""

    def forward(
        self, q: Tensor, keys: SparseKeys, sink: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        launch = SparseLaunch.of(q, keys, sink)
        block = launch.blocks.forward
        shape = launch.shape(block, dtype=q.dtype, selection=launch.has_selection)
        out = q.new_empty(*q.shape[:-1], launch.value_dim)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            sparse_forward_kernel[launch.grid(shape)](
                head_rows(q),
                lse if sink is None else sink.float().contiguous(),
                launch.operands,
                out,
                lse,
                launch.sizes,
                scale,
                shape,
                num_warps=block.warps,
                num_stages=block.stages,
            )
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        keys: SparseKeys,
        sink: Tensor | None,
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> SparseGradients:
        launch = SparseLaunch.of(q, keys, sink)
        block = launch.blocks.query_gradients
        shape = launch.shape(block, dtype=q.dtype, selection=launch.has_selection)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        saved = SavedOperands(head_rows(q), head_rows(grad_out), lse, torch.empty_like(lse))
        with torch.cuda.device_of(q):
            sparse_query_gradient_kernel[launch.grid(shape)](
                saved,
                out.contiguous(),
                launch.operands,
                dq,
                launch.sizes,
                scale,
                shape,
                num_warps=block.warps,
                num_stages=block.stages,
            )
            readers = keys.sight.key_readers
            dkeys = _run_gradients(saved, launch, readers, launch.operands.keys, scale)
            dentries = None
            if keys.entries is not None:
                dentries = _entry_gradients(saved, launch, keys.sight.entry_readers, scale)
        dsink = None
        if sink is not None:
            dsink = sink_gradient_of(saved.delta, lse, sink)
        return SparseGradients(dq, dkeys, dentries, dsink)


def _entry_gradients(
    saved: SavedOperands, launch: SparseLaunch, readers: Tensor, scale: float
) -> Tensor:
    """Gradients of entries, [B, P, D] fp32."""
    entries = launch.operands.entries
    if not launch.has_selection:
        return _run_gradients(saved, launch, readers, entries, scale)
    dentries = torch.zeros(entries.shape, dtype=torch.float32, device=entries.device)
    block = launch.blocks.key_gradients
    blocks = triton.cdiv(launch.sizes.selected, block.keys)
    selected_gradient_kernel[launch.sizes.queries, blocks, launch.batch](
        saved,
        launch.operands,
        dentries,
        launch.sizes,
        scale,
        launch.shape(block, dtype=entries.dtype, selection=True),
        num_warps=block.warps,
        num_stages=block.stages,
    )
    return dentries


def _run_gradients(
    saved: SavedOperands, launch: SparseLaunch, readers: Tensor, keys: Tensor, scale: float
) -> Tensor:
    """Gradients of keys, or of entries, that are read in runs: [B, K, D] fp32."""
    batch, number, _ = keys.shape
    block = launch.blocks.key_gradients
    blocks = triton.cdiv(number, block.keys)
    most = launch.sizes.queries // LEAST_READERS
    splits = max(1, min(PROGRAMS // max(1, blocks * batch), most))
    grads = torch.empty((splits, *keys.shape), dtype=torch.float32, device=keys.device)
    if number > 0:
        sparse_key_gradient_kernel[blocks, splits, batch](
            saved,
            keys,
            readers,
            grads,
            launch.sizes._replace(keys=number),
            scale,
            launch.shape(block, dtype=keys.dtype, selection=False),
            num_warps=block.warps,
            num_stages=block.stages,
        )
    return grads.sum(0) if splits > 1 else grads[0]
