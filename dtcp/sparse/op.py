"""Sparse attention and the indexer's selection as ops: what the tracer does not enter.

Saved for backward are the inputs of attention, out and lse: local sizes, and the gathered entries
(S / ratio rows of one head, against the L rows of each head of q).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dtcp.distributed.ledger import LEDGER
from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.sparse.api import Sight, SparseKeys, sparse_kernel
from dtcp.kernels.sparse.indexer import top_entries
from dtcp.local_op import local_op


@local_op("dtcp::select_entries")
def select_entries(
    q: Tensor,
    weight: Tensor,
    keys: Tensor,
    first: Tensor,
    last: Tensor,
    closing: Tensor,
    tiles: Tensor,
    num_selected: int,
) -> Tensor:
    """`top_entries` as an op, [B, L, num_selected] int32. Has no gradient."""
    check_sight_of_batch("An indexer", last, q)
    LEDGER.record("dtcp::select_entries")
    return top_entries(q, weight, keys, first, last, closing, tiles, num_selected)


@select_entries.register_fake
def _(q: Tensor, *others: Any) -> Tensor:
    return q.new_empty((*q.shape[:2], others[-1]), dtype=torch.int32)


def sparse_attention(
    q: Tensor,
    keys: Tensor,
    entries: Tensor | None,
    selected: Tensor | None,
    sink: Tensor | None,
    sight: Sight,
    *,
    scale: float,
    value_dim: int | None = None,
) -> Tensor:
    """Attend to raw keys inside the window and to entries, in one softmax.

    Args:
        q: [B, L, H, D].
        keys: [B, K, D]; they are the values too.
        entries: [B, P, D], in the order of their positions.
        selected: [B, L, k] int32, which entries each query reads, of `select_entries`: ascending,
            then -1, and all that it sees where they are k or fewer. None: all it sees.
        sink: [H], a score that takes its share and adds nothing.
        value_dim: V, channels of keys and entries that are values, from the first on; None: all.
    Returns:
        [B, L, H, V].
    Raises:
        ValueError: keys or entries have other channels than q, or fewer than value_dim.
    """
    widths = [x.shape[-1] for x in (q, keys, entries) if x is not None]
    if any(width != q.shape[-1] for width in widths):
        raise ValueError(
            f"Queries, keys and entries of sparse attention have as many channels, got {widths}: "
            f"project all to one width."
        )
    value_dim = q.shape[-1] if value_dim is None else value_dim
    if not 0 < value_dim <= q.shape[-1]:
        raise ValueError(
            f"A value is the first channels of its key, got value_dim={value_dim} with keys of "
            f"{q.shape[-1]} channels: name at most as many, or leave it out for all."
        )
    return _forward(q, keys, entries, selected, sink, list(sight), scale, value_dim)[0]


@local_op("dtcp::sparse_attention")
def _forward(
    q: Tensor,
    keys: Tensor,
    entries: Tensor | None,
    selected: Tensor | None,
    sink: Tensor | None,
    sight: Sequence[Tensor],
    scale: float,
    value_dim: int,
) -> tuple[Tensor, Tensor]:
    sources = SparseKeys(keys, entries, selected, Sight(*sight), value_dim)
    check_sight_of_batch("Sparse attention", sources.sight.last, q)
    LEDGER.record("dtcp::sparse_attention")
    return sparse_kernel(q, sources, sink).forward(q, sources, sink, scale)


@_forward.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    rows = q.shape[:-1]
    return q.new_empty(*rows, others[-1]), q.new_empty(rows, dtype=accumulation(q.dtype))


@local_op("dtcp::sparse_attention_backward")
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
    sources = SparseKeys(keys, entries, selected, Sight(*sight), out.shape[-1])
    kernel = sparse_kernel(q, sources, sink)
    dq, dkeys, *rest = kernel.backward(grad_out, q, sources, sink, out, lse, scale)
    dentries, dsink = (q.new_empty(0) if x is None else x for x in rest)
    return dq, dkeys.to(keys.dtype), dentries.to(keys.dtype), dsink


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keys, entries, _, sink, *_ = others
    dentries, dsink = (
        q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (entries, sink)
    )
    return q.new_empty(q.shape), keys.new_empty(keys.shape), dentries, dsink


def check_sight_of_batch(subject: str, last: Tensor, q: Tensor) -> None:
    """Refuse the metadata of other tokens; in an op's body, where no graph is guarded by it."""
    if last.shape != q.shape[:2]:
        raise ValueError(
            f"{subject} reads the metadata of its own batch, got some for {tuple(last.shape)} "
            f"tokens with q.shape={tuple(q.shape)}: pass those made with this batch."
        )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, keys, entries, selected, sink, sight, ctx.scale, _ = inputs
    kept = (q, keys, entries, selected, sink, *output)
    ctx.there = [x is not None for x in kept]
    ctx.save_for_backward(*(x for x in kept if x is not None), *sight)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Any, ...]:
    kept = list(ctx.saved_tensors)
    q, keys, entries, selected, sink, out, lse = (kept.pop(0) if x else None for x in ctx.there)
    grads = _backward(grad_out, q, keys, entries, selected, sink, out, lse, kept, ctx.scale)
    dq, dkeys, dentries, dsink = grads
    dentries = None if entries is None else dentries
    dsink = None if sink is None else dsink
    return dq, dkeys, dentries, None, dsink, [None] * len(kept), None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
