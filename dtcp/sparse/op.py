"""Sparse attention as an op: what the tracer does not enter, and what backward keeps.

Saved are its inputs, out and lse: local sizes, and the gathered entries (S / ratio rows of one
head, to L rows of every head of q).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dtcp.distributed.ledger import LEDGER
from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.sparse import reference as sparse
from dtcp.kernels.sparse.reference import Gathered, Sight
from dtcp.kernels.triton_support import tile_width, usable

WIDEST_HEAD = 512
"""Channels of which a block of rows fits into the registers of a GPU's processor."""
BLOCKS_TAKE = 200 * 1024
"""Shared memory of a block of rows of so many channels: an A100 has less."""


class SparseKernel(Protocol):
    """A pair of functions as in sparse.py."""

    def sparse_forward(
        self, q: Tensor, given: Gathered, sink: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def sparse_backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        given: Gathered,
        sink: Tensor | None,
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]: ...


def sparse_kernel(q: Tensor, given: Gathered) -> SparseKernel:
    """Triton's kernels on GPUs that they run on, in dtypes and widths that they take.

    Their gradients of picked entries are added up in no fixed order: where torch is told to be
    deterministic, its own path is taken, which then is.
    """
    parts = [x for x in (given.keys, given.entries) if x is not None]
    alike = all(x.dtype == q.dtype for x in parts)
    ordered = given.selected is None or not torch.are_deterministic_algorithms_enabled()
    fits = tile_width(q, q.shape[-1], shared=BLOCKS_TAKE) <= WIDEST_HEAD
    if not (alike and ordered and fits and usable(q)):
        return sparse
    # Holds kernels, so it imports Triton, which not every machine has.
    from dtcp.kernels.sparse.triton import attention as sparse_gpu

    return sparse_gpu


def sparse_attention(
    q: Tensor,
    keys: Tensor,
    entries: Tensor | None,
    selected: Tensor | None,
    sink: Tensor | None,
    sight: Sight,
    *,
    scale: float,
) -> Tensor:
    """Attend to raw keys inside the window and to entries, in one softmax.

    Args:
        q: [B, L, H, D].
        keys: [B, K, D]; they are the values too.
        entries: [B, P, D], in the order of their positions.
        selected: [B, L, k] int32, which entries each query reads, of `select_entries`: ascending,
            then -1, and all that it sees where they are k or fewer. None: all it sees.
        sink: [H], a score that takes its share and adds nothing.
    Returns:
        [B, L, H, D].
    """
    return _forward(q, keys, entries, selected, sink, list(sight), scale)[0]


@torch.library.custom_op("dtcp::sparse_attention", mutates_args=())
def _forward(
    q: Tensor,
    keys: Tensor,
    entries: Tensor | None,
    selected: Tensor | None,
    sink: Tensor | None,
    sight: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    LEDGER.record("dtcp::sparse_attention")
    given = Gathered(keys, entries, selected, Sight(*sight))
    return sparse_kernel(q, given).sparse_forward(q, given, sink, scale)


@_forward.register_fake
def _(
    q: Tensor,
    keys: Tensor,
    entries: Tensor | None,
    selected: Tensor | None,
    sink: Tensor | None,
    sight: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=accumulation(q.dtype))


@torch.library.custom_op("dtcp::sparse_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    keys: Tensor,
    entries: Tensor | None,
    selected: Tensor | None,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    sight: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    LEDGER.record("dtcp::sparse_attention_backward")
    given = Gathered(keys, entries, selected, Sight(*sight))
    kernel = sparse_kernel(q, given)
    dq, dkeys, *rest = kernel.sparse_backward(grad_out, q, given, sink, out, lse, scale)
    dentries, dsink = (q.new_empty(0) if x is None else x for x in rest)
    return dq, dkeys.to(keys.dtype), dentries.to(keys.dtype), dsink


@_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    keys: Tensor,
    entries: Tensor | None,
    selected: Tensor | None,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    sight: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dentries, dsink = (
        q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (entries, sink)
    )
    return q.new_empty(q.shape), keys.new_empty(keys.shape), dentries, dsink


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, keys, entries, selected, sink, sight, ctx.scale = inputs
    given = (q, keys, entries, selected, sink, *output)
    ctx.there = [x is not None for x in given]
    ctx.save_for_backward(*(x for x in given if x is not None), *sight)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Any, ...]:
    kept = list(ctx.saved_tensors)
    q, keys, entries, selected, sink, out, lse = (kept.pop(0) if x else None for x in ctx.there)
    grads = _backward(grad_out, q, keys, entries, selected, sink, out, lse, kept, ctx.scale)
    dq, dkeys, dentries, dsink = grads
    dentries = None if entries is None else dentries
    dsink = None if sink is None else dsink
    return dq, dkeys, dentries, None, dsink, [None] * len(kept), None


_forward.register_autograd(_differentiate, setup_context=_keep)
