"""Rows of tokens gathered from other ranks, as many as this rank's queries see, and kept."""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dtcp.distributed.ledger import LEDGER
from dtcp.distributed.moves import Moved, Moves
from dtcp.distributed.ops import communicating_op
from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.softmax.api import SoftmaxParams
from dtcp.softmax.exchange import bring_rows, return_grads
from dtcp.softmax.metadata import KeyExchangeMetadata
from dtcp.softmax.moves import AttentionShape, Peers
from dtcp.softmax.strategy import OpContext

LOG = logging.getLogger("dtcp.softmax")


def _context(op: str, keys: KeyExchangeMetadata, x: Tensor, group: str) -> OpContext:
    return OpContext(f"dtcp::{op}", keys, SoftmaxParams(1.0), [group], x.shape[2])


def gathered_moves(metadata: KeyExchangeMetadata, shape: AttentionShape, rank: int) -> Moves:
    """Of rows of a shape; their gradients are summed in wider ones."""
    sent, received = metadata.moved.tolist()
    row, back = shape.key_row, shape.grad_row
    summed = row // shape.element_size * shape.accumulated
    held = metadata.first_key.shape[-1] + sum(received)
    there = row * (sum(sent) + sum(received) + held)
    return Moves(
        Moved.rows(sent, received, row, rank, workspace=there),
        Moved.rows(received, sent, back, rank, workspace=(back + 2 * summed) * held),
    )


def _op_moves(x: Tensor, metadata: list[Tensor], group: str, dtype: torch.dtype) -> Moves:
    """Of rows, or of their gradients, that travel in a dtype."""
    batch, _, heads, width = x.shape
    shape = AttentionShape(batch, heads, heads, width, 0, dtype.itemsize)
    return gathered_moves(KeyExchangeMetadata.of_tensors(metadata), shape, Peers.of([group]).rank)


def _forward_moves(
    x: Tensor, metadata: list[Tensor], group: str, dtype: torch.dtype, wide: bool
) -> Moved:
    return _op_moves(x, metadata, group, dtype).forward


def _backward_moves(grad: Tensor, metadata: list[Tensor], group: str) -> Moved:
    return _op_moves(grad, metadata, group, grad.dtype).backward


@communicating_op("dtcp::gather_shared_kv", moves=_forward_moves)
def gather_rows(
    x: Tensor, metadata: list[Tensor], group: str, dtype: torch.dtype, wide: bool
) -> Tensor:
    """Put local and required rows in token order: [B, L, G, W] -> [B, K, G, W], zero behind.

    K is the same on every rank and for every batch.

    Args:
        x: in the dtype that its gradient is to have.
        dtype: in which rows are read, this rank's own like the others', and travel.
        wide: give them in the dtype of `accumulation`, whatever they travel in, and so take their
            gradients.
    Raises:
        ValueError: rows of another batch, on all ranks alike and before they exchange any.
    """
    keys, x = KeyExchangeMetadata.of_tensors(metadata), x.to(dtype)
    if keys.first_key.shape[-2] not in (1, x.shape[0]) or keys.own_keys != x.shape[1]:
        raise ValueError(
            f"Rows are gathered by the metadata of their own batch, got some for {keys.own_keys} "
            f"tokens of {keys.first_key.shape[-2]} rows with x.shape={tuple(x.shape)}: pass those "
            f"made with this batch."
        )
    LEDGER.record("dtcp::gather_shared_kv")
    slots = keys.send_slot[: int(keys.counts[0].sum())]
    rows = x.index_select(1, slots).transpose(0, 1).contiguous()
    received = bring_rows(rows, keys, _context("gather_shared_kv", keys, x, group))
    every = torch.cat((x, received.transpose(0, 1)), dim=1)
    out = _gathered_like(x, keys, wide).zero_()
    order = keys.key_order
    out[:, : order.numel()] = every.index_select(1, order)
    return out


@communicating_op("dtcp::gather_shared_kv_backward", moves=_backward_moves)
def _gather_backward(grad: Tensor, metadata: list[Tensor], group: str) -> Tensor:
    keys = KeyExchangeMetadata.of_tensors(metadata)
    LEDGER.record("dtcp::gather_shared_kv_backward")
    if keys.counts.shape[1] > 1 and grad.dtype != accumulation(grad.dtype):
        _say_rounded()
    rows = grad[:, : keys.key_order.numel()].transpose(0, 1).to(accumulation(grad.dtype))
    context = _context("gather_shared_kv_backward", keys, grad, group)
    return return_grads(rows, keys, grad.dtype, context).to(grad.dtype)


@cache
def _say_rounded() -> None:
    LOG.info(
        "Ranks sum gradients of gathered keys or latents that each has rounded: more than one "
        "device's error. With reduce_dtype=torch.float32 none is rounded."
    )


@gather_rows.register_fake
def _(x: Tensor, metadata: list[Tensor], group: str, dtype: torch.dtype, wide: bool) -> Tensor:
    return _gathered_like(x.to(dtype), KeyExchangeMetadata.of_tensors(metadata), wide)


@_gather_backward.register_fake
def _(grad: Tensor, metadata: list[Tensor], group: str) -> Tensor:
    keys = KeyExchangeMetadata.of_tensors(metadata)
    return grad.new_empty((grad.shape[0], keys.first_key.shape[-1], *grad.shape[2:]))


def _gathered_like(x: Tensor, keys: KeyExchangeMetadata, wide: bool) -> Tensor:
    shape = (x.shape[0], keys.key_token_index.shape[1], *x.shape[2:])
    return x.new_empty(shape, dtype=accumulation(x.dtype) if wide else x.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, metadata, ctx.group, *_ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(*metadata)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    metadata = list(ctx.saved_tensors)
    grad_shard = _gather_backward(grad, metadata, ctx.group).to(ctx.dtype)
    return grad_shard, [None] * len(metadata), None, None, None


gather_rows.register_autograd(_differentiate, setup_context=_keep)
