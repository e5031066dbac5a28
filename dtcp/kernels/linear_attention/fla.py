"""Gated linear attention with a decay by head (Mamba-2) by fla-core's kernels.

What `fla.ops.simple_gla.chunk_simple_gla` calls, called below it, for the reasons that the delta
rule's file gives. A stretch's map is cheap here: what it scales a state by is a product of decays.

Written against fla-core 0.6, which is imported where it is called.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.delta_rule.chunks import per_head
from dtcp.kernels.delta_rule.fla import CHUNK, FORGET, TO_LOG2, whole_chunks
from dtcp.kernels.delta_rule.fla_inside import inside_chunks_in_torch, is_guarded
from dtcp.kernels.delta_rule.types import Carry, carried
from dtcp.kernels.linear_attention.types import LinearGradients, LinearInputs


class PaddedChunks(NamedTuple):
    """What forward and backward both compute first, padded to whole chunks and in one dtype."""

    q: Tensor  # [R, T, G, K]
    k: Tensor  # [R, T, G, K]
    v: Tensor  # [R, T, H, V]
    decay: Tensor  # [R, T, H], running sum of log2-decay in each chunk
    through: Tensor  # [R, H, 1, 1], what a whole stretch scales a state by


class FlaLinearAttention:
    """As `ReferenceLinearAttention`, by fla's kernels; states and maps are fp32."""

    def forward(
        self, parts: Sequence[LinearInputs], carry: Carry | None
    ) -> tuple[list[Tensor], Tensor]:
        prepared = [_prepare(x) for x in parts]
        states = carried(carry, lambda: [_summary(chunks) for chunks in prepared])
        states = states or [_zero_state(chunks) for chunks in prepared]
        each = zip(prepared, states, parts, strict=True)
        return [_read(*of_part) for of_part in each], torch.cat(states)

    def backward(
        self,
        parts: Sequence[LinearInputs],
        grads_out: Sequence[Tensor],
        state: Tensor,
        carry: Carry | None,
    ) -> list[LinearGradients]:
        prepared = [_prepare(x) for x in parts]
        of_outs = zip(prepared, grads_out, strict=True)
        grads = [whole_chunks(grad.to(chunks.v.dtype)) for chunks, grad in of_outs]
        of_parts = list(zip(prepared, grads, strict=True))
        maps = carried(carry, lambda: [_summary_backward(*of_part) for of_part in of_parts])
        finals: Sequence[Tensor | None] = maps or [None] * len(parts)
        entered = state.split([len(x.v) for x in parts])
        each = zip(parts, prepared, grads, entered, finals, strict=True)
        return [_differentiate(*of_part) for of_part in each]


def _prepare(x: LinearInputs) -> PaddedChunks:
    from fla.ops.utils import chunk_local_cumsum

    q, k, v = (whole_chunks(part.to(x.v.dtype)) for part in (x.q, x.k, x.v))
    # What came before a document's start does not go through the stretch at all.
    through = x.g.float().masked_fill(x.starts[..., None] != 0, -torch.inf).sum(1).exp()
    g = whole_chunks(x.g.float().masked_fill(x.starts[..., None] != 0, FORGET))
    decay = chunk_local_cumsum(g, chunk_size=CHUNK, scale=TO_LOG2)
    return PaddedChunks(q, k, v, decay, through[..., None, None])


def _states(chunks: PaddedChunks, state: Tensor | None, *, wide: bool) -> tuple[Tensor, Tensor]:
    """The state that enters each chunk, [R, N, H, K, V], and the one that leaves the last.

    Args:
        wide: keep those of chunks in fp32.
    """
    from fla.ops.common.chunk_h import chunk_fwd_h

    h, final = chunk_fwd_h(
        k=per_head(chunks.k, chunks.v.shape[2]),
        v=chunks.v,
        g=chunks.decay,
        h0=None if state is None else state.contiguous(),
        output_final_state=True,
        chunk_size=CHUNK,
        states_in_fp32=wide,
    )
    return h, final


def _summary(chunks: PaddedChunks) -> Tensor:
    """The map [d | b] of every stretch, [R, H, K, 1 + V]."""
    return _map(chunks, _states(chunks, None, wide=False)[1])


def _summary_backward(chunks: PaddedChunks, grad: Tensor) -> Tensor:
    """The map of gradients of states through every stretch, [R, H, K, 1 + V]."""
    return _map(chunks, _states_backward(chunks, grad, None)[1])


def _map(chunks: PaddedChunks, written: Tensor) -> Tensor:
    return torch.cat((chunks.through.expand(*written.shape[:-1], 1), written), dim=-1)


def _read(chunks: PaddedChunks, state: Tensor, x: LinearInputs) -> Tensor:
    from fla.ops.common.chunk_o import chunk_fwd_o

    h, _ = _states(chunks, state, wide=False)
    out = chunk_fwd_o(q=chunks.q, k=chunks.k, v=chunks.v, h=h, g=chunks.decay, scale=1.0)
    return out[:, : x.v.shape[1]].to(x.v.dtype)


def _states_backward(
    chunks: PaddedChunks, grad: Tensor, d_final: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the state after each chunk, [R, N, H, K, V], and of the one that enters."""
    from fla.ops.common.chunk_h import chunk_bwd_dh

    heads = chunks.v.shape[2]
    d_h, d_entering = chunk_bwd_dh(
        q=per_head(chunks.q, heads),
        k=per_head(chunks.k, heads),
        v=chunks.v,
        do=grad,
        h0=_zero_state(chunks),  # only its shape is read
        dht=None if d_final is None else d_final.contiguous(),
        scale=1.0,
        g=chunks.decay,
        chunk_size=CHUNK,
        states_in_fp32=True,
    )
    return d_h, d_entering


def _differentiate(
    x: LinearInputs, chunks: PaddedChunks, grad: Tensor, state: Tensor, d_final: Tensor | None
) -> LinearGradients:
    from fla.ops.common.chunk_o import chunk_bwd_dqkwg, chunk_bwd_dv
    from fla.ops.utils import chunk_local_cumsum

    h, _ = _states(chunks, state, wide=True)
    d_h, _ = _states_backward(chunks, grad, d_final)
    q, k, v, decay, _ = chunks
    if is_guarded():
        dq, dk, _, dg = inside_chunks_in_torch(q, k, decay, new=v, h=h, grad=grad, d_h=d_h)
    else:
        dq, dk, _, dg = chunk_bwd_dqkwg(
            q=q, k=k, v=v, g=decay, h=h, do=grad, dh=d_h, scale=1.0, chunk_size=CHUNK
        )
    dv = chunk_bwd_dv(q=q, k=k, do=grad, dh=d_h, g=decay, scale=1.0, chunk_size=CHUNK)
    dg = chunk_local_cumsum(dg, chunk_size=CHUNK, reverse=True)
    length = x.v.shape[1]
    dg = dg[:, :length].masked_fill(x.starts[..., None] != 0, 0)
    grads = (dq[:, :length], dk[:, :length], dv[:, :length], dg)
    return LinearGradients(*(g.to(part.dtype) for g, part in zip(grads, x, strict=False)))


def _zero_state(chunks: PaddedChunks) -> Tensor:
    rows, _, heads, value_dim = chunks.v.shape
    return chunks.v.new_zeros(rows, heads, chunks.k.shape[-1], value_dim, dtype=torch.float32)
