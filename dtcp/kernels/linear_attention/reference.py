"""Gated linear attention in plain torch: chunks in matmuls, states from chunk to chunk.

The delta rule without its correction: a token's write does not depend on the state that it meets.
So a stretch scales the rows of the state that enters it and adds one: a map [d | b] of [K, 1 + V],
where the delta rule's is a matrix [M | b] of [K, K + V].

From Dao and Gu 2024, Mamba-2, section 6, https://arxiv.org/abs/2405.21060
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.delta_rule.chunks import (
    by_channel,
    chunk_length,
    in_chunks,
    in_tokens,
    per_head,
)
from dtcp.kernels.delta_rule.decay import Decay, decay_of
from dtcp.kernels.delta_rule.types import Carry
from dtcp.kernels.linear_attention.types import LinearGradients, LinearInputs


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

    def forward(self, x: LinearInputs, carry: Carry | None) -> tuple[Tensor, Tensor]:
        """out [R, T, H, V] in the dtype of v, and the state [R, H, K, V] that entered."""
        chunks = _prepare(x)
        written = (chunks.decay.leave * chunks.k).mT @ chunks.v
        state = _entering(chunks.through, written, carry)
        states = _before_chunks(chunks.through, written, state)
        own = chunks.decay.scores(chunks.q, chunks.k) @ chunks.v
        out = (chunks.decay.enter * chunks.q) @ states + own
        return in_tokens(out, x.v.shape[1]).to(x.v.dtype), state

    def backward(
        self, x: LinearInputs, grad_out: Tensor, state: Tensor, carry: Carry | None
    ) -> LinearGradients:
        """Gradients of the inputs; `carry` is told the maps of gradients, from the right."""
        chunks = _prepare(x)
        q, k, v, decay = chunks
        grad = in_chunks(grad_out, q.shape[3]).to(v.dtype)
        written = (decay.leave * k).mT @ v
        states = _before_chunks(chunks.through, written, state)
        # From right to left the gradient of the state goes the way of the state.
        through, read = (y.flip(2) for y in (chunks.through, (decay.enter * q).mT @ grad))
        d_after = _before_chunks(through, read, _entering(through, read, carry)).flip(2)

        scores = decay.scores(q, k)
        d_v = scores.mT @ grad + (decay.leave * k) @ d_after
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
    chunk, heads = chunk_length(x.v.shape[1]), x.v.shape[2]
    q, k = (in_chunks(per_head(part, heads), chunk) for part in (x.q, x.k))
    starts = in_chunks(x.starts[..., None, None], chunk)[..., 0]  # [R, 1, N, C]
    decay = decay_of(in_chunks(by_channel(x.g), chunk), starts)
    return LinearChunks(q, k, in_chunks(x.v, chunk), decay)


def _entering(through: Tensor, written: Tensor, carry: Carry | None) -> Tensor:
    """The state that enters the stretches, [R, H, K, V], once `carry` knows what they come to."""
    nothing = torch.zeros_like(written[:, :, 0])
    if carry is None:
        return nothing
    after = through[:, :, -1] * _before_chunks(through, written, nothing)[:, :, -1]
    scaled = through.prod(2).expand(*nothing.shape[:-1], 1)
    return carry(torch.cat((scaled, after + written[:, :, -1]), dim=-1))


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
    length, groups = like.v.shape[1], like.k.shape[2]
    d_sum = d_sum if like.g.ndim == 4 else d_sum.sum(-1, keepdim=True)
    d_g = in_tokens(d_sum.flip(-2).cumsum(-2).flip(-2), length).reshape(like.g.shape)
    d_g = d_g.masked_fill(like.starts.view(*like.starts.shape, *(1,) * (d_g.ndim - 2)) != 0, 0)
    d_q, d_k = (in_tokens(x, length).unflatten(2, (groups, -1)).sum(3) for x in (d_q, d_k))
    grads = (d_q, d_k, in_tokens(d_v, length), d_g)
    return LinearGradients(*(x.to(part.dtype) for x, part in zip(grads, like, strict=False)))
