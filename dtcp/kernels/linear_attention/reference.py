"""Gated linear attention in plain torch: chunks in matmuls, states from chunk to chunk.

The delta rule without its correction: a token's write does not depend on the state that it meets.
So a stretch scales the rows of the state that enters it and adds one: a map [d | b] of [K, 1 + V],
where the delta rule's is a matrix [M | b] of [K, K + V].

From Dao and Gu 2024, Mamba-2, section 6, https://arxiv.org/abs/2405.21060
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.delta_rule.chunks import (
    CHUNK_LEN,
    by_channel,
    chunk_length,
    decay_gradient,
    in_chunks,
    in_tokens,
    per_head,
    summed_per_head,
)
from dtcp.kernels.delta_rule.decay import Decay, decay_of
from dtcp.kernels.delta_rule.types import Carry, carried
from dtcp.kernels.linear_attention.types import LinearGradients, LinearInputs

NARROW_CHUNK_LEN = 16
"""Tokens per chunk where values are one channel wide, as those of Mamba: scores of a chunk are as
many as its tokens, for each channel and token."""


class LinearChunks(NamedTuple):
    """The stretches cut into N chunks."""

    q: Tensor  # [R, H, N, C, K], fp32 (fp64 for fp64), as all that follows
    k: Tensor  # [R, H, N, C, K]
    v: Tensor  # [R, H, N, C, V]
    decay: Decay  # from token to token; [R, H, N, C, 1] per head, [R, H, N, C, K] per channel

    @property
    def through(self) -> Tensor:
        """Decay of the state's rows over a whole chunk: [R, H, N, 1, 1] or [R, H, N, K, 1]."""
        return self.decay.enter[..., -1:, :].mT


class ReferenceLinearAttention:
    """Gated linear attention on every stretch, on any device and in any dtype."""

    def forward(
        self, parts: Sequence[LinearInputs], carry: Carry | None
    ) -> tuple[list[Tensor], Tensor]:
        """out of each part, [R, T, H, V] in the dtype of v, and the states [all R, H, K, V] that
        entered; parts as `DeltaKernel` takes them."""
        prepared = [_prepare(x) for x in parts]
        maps = [(x.through, (x.decay.leave * x.k).mT @ x.v) for x in prepared]
        states, out = _entering(maps, carry), []
        for x, chunks, of_chunks, state in zip(parts, prepared, maps, states, strict=True):
            before = _before_chunks(*of_chunks, state)
            own = chunks.decay.scores(chunks.q, chunks.k) @ chunks.v
            read = (chunks.decay.enter * chunks.q) @ before + own
            out.append(in_tokens(read, x.v.shape[1]).to(x.v.dtype))
        return out, torch.cat(states)

    def backward(
        self,
        parts: Sequence[LinearInputs],
        grads_out: Sequence[Tensor],
        state: Tensor,
        carry: Carry | None,
    ) -> list[LinearGradients]:
        """Gradients of the inputs; `carry` receives the maps of gradients, from the right."""
        prepared = [_prepare(x) for x in parts]
        grads = [
            in_chunks(grad, chunks.q.shape[3]).to(chunks.v.dtype)
            for grad, chunks in zip(grads_out, prepared, strict=True)
        ]
        # From right to left the gradient of the state goes the way of the state.
        maps = [
            (chunks.through.flip(2), ((chunks.decay.enter * chunks.q).mT @ grad).flip(2))
            for chunks, grad in zip(prepared, grads, strict=True)
        ]
        after = [
            _before_chunks(*of_chunks, final).flip(2)
            for of_chunks, final in zip(maps, _entering(maps, carry), strict=True)
        ]
        states = state.split([len(x.v) for x in parts])
        each = zip(parts, prepared, grads, states, after, strict=True)
        return [_differentiate(*of_part) for of_part in each]


def _differentiate(
    x: LinearInputs, chunks: LinearChunks, grad: Tensor, state: Tensor, d_after: Tensor
) -> LinearGradients:
    """Gradients of a part's inputs, from those of its output and of the state after each chunk."""
    q, k, v, decay = chunks
    states = _before_chunks(chunks.through, (decay.leave * k).mT @ v, state)
    d_v = decay.scores(q, k).mT @ grad + (decay.leave * k) @ d_after
    reading, being_read = decay.scores_backward(grad @ v.mT, q, k)
    leaving = decay.leave * (v @ d_after.mT)
    d_q, d_k = reading + decay.enter * (grad @ states.mT), being_read + leaving
    # Decays are exponentials of differences of one running sum: what a token reads has a
    # positive share in the sum's gradient at that token, what is read of it a negative one.
    d_sum = d_q * q - d_k * k
    d_through = (states * d_after).sum(-1) * chunks.through[..., 0]
    d_sum[..., -1, :] += d_through + (leaving * k).sum(-2)
    return _gradients(x, d_q, d_k, d_v, d_sum)


def _prepare(x: LinearInputs) -> LinearChunks:
    heads = x.v.shape[2]
    chunk = chunk_length(x.v.shape[1], most=NARROW_CHUNK_LEN if x.v.shape[3] == 1 else CHUNK_LEN)
    q, k = (in_chunks(per_head(part, heads), chunk) for part in (x.q, x.k))
    starts = in_chunks(x.starts[..., None, None], chunk)[..., 0]  # [R, 1, N, C]
    decay = decay_of(in_chunks(by_channel(x.g), chunk), starts)
    return LinearChunks(q, k, in_chunks(x.v, chunk), decay)


def _entering(maps: Sequence[tuple[Tensor, Tensor]], carry: Carry | None) -> list[Tensor]:
    """The states that enter the stretches of each part, [R, H, K, V].

    Args:
        maps: of each chunk of the parts: what it scales a state by, and what it adds.
        carry: knows it, once it has what whole stretches come to.
    """
    nothing = [torch.zeros_like(written[:, :, 0]) for _, written in maps]
    each = list(zip(maps, nothing, strict=True))
    carried_on = carried(carry, lambda: [_summary(*of_chunks, zero) for of_chunks, zero in each])
    return carried_on or nothing


def _summary(through: Tensor, written: Tensor, nothing: Tensor) -> Tensor:
    """The map [d | b] of whole stretches: [R, H, K, 1 + V]."""
    after = through[:, :, -1] * _before_chunks(through, written, nothing)[:, :, -1]
    scaled = through.prod(2).expand(*nothing.shape[:-1], 1)
    return torch.cat((scaled, after + written[:, :, -1]), dim=-1)


def _before_chunks(through: Tensor, written: Tensor, state: Tensor) -> Tensor:
    """The state that enters each chunk: [R, H, N, K, V]."""
    states = []
    for n in range(written.shape[2]):
        states.append(state)
        state = through[:, :, n] * state + written[:, :, n]
    return torch.stack(states, dim=2)


def _gradients(
    like: LinearInputs, d_q: Tensor, d_k: Tensor, d_v: Tensor, d_sum: Tensor
) -> LinearGradients:
    """From chunks back to the shapes and dtypes of the inputs."""
    length, key_heads = like.v.shape[1], like.k.shape[2]
    d_g = decay_gradient(d_sum, like.g, like.starts)
    d_q, d_k = (summed_per_head(in_tokens(x, length), key_heads) for x in (d_q, d_k))
    grads = (d_q, d_k, in_tokens(d_v, length), d_g)
    return LinearGradients(*(x.to(part.dtype) for x, part in zip(grads, like, strict=False)))
