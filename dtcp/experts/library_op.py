"""Tokens to experts and back by a library of GPU kernels, as ops with their backward.

The backward pass of either op is the other: gradients of rows come home as results do, and those of
results go out as tokens do, by the same handle.
"""

from typing import Any

import torch
from torch import Tensor

from dtcp.distributed.counting import count_crossed
from dtcp.distributed.moves import Moved
from dtcp.distributed.ops import communicating_op
from dtcp.experts.libraries import library_of
from dtcp.experts.libraries.types import pack_handle, unpack_handle
from dtcp.experts.moves import moved_rows
from dtcp.experts.op import own_share


def _dispatch_moves(x: Tensor, counts: Tensor, group: str, *_: Any) -> Moved:
    """Of rows to the ranks of experts; what a library sends besides is not counted.

    Args:
        counts: [2, n], rows to and from each rank.
    """
    send, receive = counts.tolist()
    return moved_rows(x, send, receive, group)


def _combine_moves(x: Tensor, counts: Tensor, group: str, *_: Any) -> Moved:
    """Of rows on their way back."""
    send, receive = counts.tolist()
    return moved_rows(x, receive, send, group)


def _record(op: str, moved: Moved, group: str) -> None:
    count_crossed(f"dtcp::{op}", group, moved.sent, moved.received)


@communicating_op("dtcp::library_dispatch", moves=_dispatch_moves)
def library_dispatch(
    x: Tensor,
    counts: Tensor,
    group: str,
    library: str,
    index: Tensor,
    weight: Tensor,
    num_experts: int,
    shared_by: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send tokens to their experts.

    Args:
        x, index, weight: [N, D], [N, k] and [N, k]; num_experts for what is not routed.
        counts: [2, n], tokens to and from each rank.
    Returns:
        rows [R, D] by expert, what each weighs [R], ends [E / n] int32, and the packed handle.
    """
    _record("library_dispatch", _dispatch_moves(x, counts, group), group)
    own = own_share(index, num_experts, shared_by)
    rows, weights, ends, handle = library_of(library, group).dispatch(x, own, weight, num_experts)
    return rows, weights, ends, *pack_handle(handle)


@library_dispatch.register_fake
def _(x: Tensor, counts: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, _, _, weight, num_experts, _ = others
    sizes = torch.library.get_ctx()
    rows = sizes.new_dynamic_size()
    return (
        x.new_empty(rows, x.shape[1]),
        weight.new_empty(rows),
        x.new_empty(num_experts // counts.shape[1], dtype=torch.int32),
        x.new_empty(sizes.new_dynamic_size(), dtype=torch.uint8),
        torch.empty(sizes.new_dynamic_size(), dtype=torch.int64, device="cpu"),
    )


@communicating_op("dtcp::library_combine", moves=_combine_moves)
def library_combine(
    rows: Tensor,
    counts: Tensor,
    group: str,
    library: str,
    layout: Tensor,
    numbers: Tensor,
    like: Tensor,
    num_tokens: int,
) -> Tensor:
    """Bring rows [R, D] home and sum those of a token: [N, D].

    Args:
        layout, numbers: the packed handle of library_dispatch.
        like: [R], as many as there are rows.
    """
    _record("library_combine", _combine_moves(rows, counts, group), group)
    return library_of(library, group).combine(rows, unpack_handle(layout, numbers))


@library_combine.register_fake
def _(rows: Tensor, *others: Any) -> Tensor:
    return rows.new_empty(others[-1], rows.shape[1])


@communicating_op("dtcp::library_dispatch_backward", moves=_combine_moves)
def _library_dispatch_backward(
    rows: Tensor,
    counts: Tensor,
    group: str,
    library: str,
    layout: Tensor,
    numbers: Tensor,
    index: Tensor,
    weights: Tensor,
    num_experts: int,
    shared_by: str,
) -> tuple[Tensor, Tensor]:
    _record("library_dispatch_backward", _combine_moves(rows, counts, group), group)
    own, handle = own_share(index, num_experts, shared_by), unpack_handle(layout, numbers)
    x, weight = library_of(library, group).combine_weights(rows, weights, own, handle)
    # Of choices that were not routed a library may leave anything.
    return x, weight.masked_fill(own == num_experts, 0)


@_library_dispatch_backward.register_fake
def _(rows: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    index, weights = others[5:7]
    return rows.new_empty(index.shape[0], rows.shape[1]), weights.new_empty(index.shape)


@communicating_op("dtcp::library_combine_backward", moves=_dispatch_moves)
def _library_combine_backward(
    grad: Tensor,
    counts: Tensor,
    group: str,
    library: str,
    layout: Tensor,
    numbers: Tensor,
    like: Tensor,
) -> Tensor:
    _record("library_combine_backward", _dispatch_moves(grad, counts, group), group)
    return library_of(library, group).dispatch_again(grad, unpack_handle(layout, numbers))


@_library_combine_backward.register_fake
def _(grad: Tensor, *others: Any) -> Tensor:
    return grad.new_empty(others[-1].shape[0], grad.shape[1])


def _keep_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, counts, *ctx.names, index, weight, ctx.num_experts, ctx.shared_by = inputs
    ctx.save_for_backward(counts, *output[3:], index)
    ctx.dtypes = x.dtype, weight.dtype


def _dispatch_backward(ctx: Any, rows: Tensor, weights: Tensor, *_: Any) -> tuple[Any, ...]:
    counts, *handle, index = ctx.saved_tensors
    of_rows = rows.contiguous(), counts, *ctx.names, *handle
    x, weight = _library_dispatch_backward(
        *of_rows, index, weights.contiguous(), ctx.num_experts, ctx.shared_by
    )
    return x.to(ctx.dtypes[0]), *[None] * 4, weight.to(ctx.dtypes[1]), None, None


def _keep_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, counts, *ctx.names, layout, numbers, like, _ = inputs
    ctx.save_for_backward(counts, layout, numbers, like)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    counts, *others = ctx.saved_tensors
    rows = _library_combine_backward(grad.contiguous(), counts, *ctx.names, *others)
    return rows, *[None] * 7


library_dispatch.register_autograd(_dispatch_backward, setup_context=_keep_dispatch)
library_combine.register_autograd(_combine_backward, setup_context=_keep_combine)
