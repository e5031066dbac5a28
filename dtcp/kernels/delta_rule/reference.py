"""The gated delta rule in plain torch, chunk by chunk, on independent stretches of tokens.

Per head, with a state S [K, V] and log-decay g, one per head or one per each of its K channels:

    S_t = e^g_t S_(t-1) + beta_t k_t (v_t - (e^g_t S_(t-1))^T k_t)^T        o_t = S_t^T q_t

A chunk of C tokens is an affine map of the state that enters it, S -> M S + b, and so is a whole
stretch. Its summary [M | b] has a size that does not depend on the number of tokens. Once the
state that enters a stretch is known, from the summaries of those before it, the stretch is
computed by itself. Backward does the same from the right: the gradient of the state that leaves a
stretch goes through M^T.

A document's first token starts from a zero state. That is exact here: between tokens of different
documents the decay factor is 0, and nothing is ever divided by a decay.

From Yang et al. 2024, "Gated Delta Networks", https://arxiv.org/abs/2412.06464; in chunks as in
Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
https://arxiv.org/abs/2406.06484.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.delta_rule.chunks import (
    by_channel,
    chunk_length,
    decay_gradient,
    in_chunks,
    in_tokens,
    per_head,
    summed_per_head,
)
from dtcp.kernels.delta_rule.decay import Decay, decay_of
from dtcp.kernels.delta_rule.types import Carry, DeltaGradients, DeltaInputs, carried


class Chunks(NamedTuple):
    """The stretches cut into N chunks, and how the tokens of a chunk act on each other."""

    q: Tensor  # [R, H, N, C, K], fp32 (fp64 for fp64), as all that follows
    k: Tensor  # [R, H, N, C, K]
    v: Tensor  # [R, H, N, C, V]
    beta: Tensor  # [R, H, N, C, 1]
    decay: Decay  # from token to token; [R, H, N, C, 1] per head, [R, H, N, C, K] per channel
    erase: Tensor  # [R, H, N, C, C], strictly lower: how much a token reads of earlier writes
    u: Tensor  # [R, H, N, C, V], what each token writes if the state that enters is 0
    w: Tensor  # [R, H, N, C, K]: a token writes u - w @ state
    score: Tensor  # [R, H, N, C, C], what each query reads of the writes of its chunk

    @property
    def through(self) -> Tensor:
        """Decay of the state's rows over a whole chunk: [R, H, N, 1, 1] or [R, H, N, K, 1]."""
        return self.decay.enter[..., -1:, :].mT


class ReferenceDeltaRule:
    """`DeltaKernel` in plain torch, on any device and in any dtype."""

    def forward(
        self, parts: Sequence[DeltaInputs], carry: Carry | None
    ) -> tuple[list[Tensor], Tensor]:
        prepared = [_prepare(x) for x in parts]
        states = carried(carry, lambda: [_summary(chunks) for chunks in prepared])
        states = states or [_zero_state(chunks) for chunks in prepared]
        each = zip(prepared, states, parts, strict=True)
        out = [_read(chunks, state, x.v.shape[1]).to(x.v.dtype) for chunks, state, x in each]
        return out, torch.cat(states)

    def backward(
        self,
        parts: Sequence[DeltaInputs],
        grads_out: Sequence[Tensor],
        state: Tensor,
        carry: Carry | None,
    ) -> list[DeltaGradients]:
        both = zip(parts, grads_out, strict=True)
        prepared = [_prepare_backward(_prepare(x), grad) for x, grad in both]
        grads = carried(carry, lambda: [_summary_backward(chunks) for chunks in prepared])
        grads = grads or [_zero_state(chunks.forward) for chunks in prepared]
        entered = state.split([len(x.v) for x in parts])
        each = zip(prepared, entered, grads, parts, strict=True)
        return [_differentiate(*of_part) for of_part in each]


def _prepare(x: DeltaInputs) -> Chunks:
    """Solve each chunk for what its tokens write, as a function of the state that enters."""
    chunk, heads = chunk_length(x.v.shape[1]), x.v.shape[2]
    q, k = (in_chunks(per_head(part, heads), chunk) for part in (x.q, x.k))
    v, beta = in_chunks(x.v, chunk), in_chunks(x.beta[..., None], chunk)
    starts = in_chunks(x.starts[..., None, None], chunk)[..., 0]  # [R, 1, N, C]
    decay = decay_of(in_chunks(by_channel(x.g), chunk), starts)

    erase = decay.scores(beta * k, k).tril(-1)
    written = torch.cat((beta * v, beta * decay.enter * k), dim=-1)
    u, w = _solve(erase, written, v.shape[-1])
    return Chunks(q, k, v, beta, decay, erase, u, w, decay.scores(q, k))


def _summary(x: Chunks) -> Tensor:
    """The map of the state over a whole stretch, [M | b]: [R, H, K, K + V]."""
    erased = torch.cat((torch.zeros_like(x.w), x.u), dim=-1)
    state = _identity(x)
    for n in range(x.u.shape[2]):
        state = _step(x, n, erased[:, :, n] - x.w[:, :, n] @ state, state)
    return state


def _read(x: Chunks, state: Tensor, length: int) -> Tensor:
    """The output [R, T, H, V], given the state [R, H, K, V] that enters."""
    states, new = _states(x, state)
    out = (x.decay.enter * x.q) @ states + x.score @ new
    return in_tokens(out, length)


class BackwardChunks(NamedTuple):
    """Chunks, and the part of the gradients that comes from their own output."""

    forward: Chunks
    grad_out: Tensor  # [R, H, N, C, V]
    read: Tensor  # [R, H, N, K, V], of the state that enters a chunk
    new: Tensor  # [R, H, N, C, V], of what the chunk's tokens write


def _prepare_backward(x: Chunks, grad_out: Tensor) -> BackwardChunks:
    """From the gradient [R, T, H, V] of the output to that of what it reads: states and writes."""
    grad = in_chunks(grad_out, x.v.shape[3]).to(x.v.dtype)
    return BackwardChunks(x, grad, (x.decay.enter * x.q).mT @ grad, x.score.mT @ grad)


def _summary_backward(x: BackwardChunks) -> Tensor:
    """The map of the state's gradient from a stretch's end to its start: [M^T | b]."""
    identity = _identity(x.forward)
    read = torch.cat((x.read.new_zeros(*x.read.shape[:-1], identity.shape[-2]), x.read), dim=-1)
    new = torch.cat((torch.zeros_like(x.forward.w), x.new), dim=-1)
    grad = identity
    for n in reversed(range(new.shape[2])):
        grad = _step_back(x.forward, n, grad, read, new)[0]
    return grad


def _differentiate(
    x: BackwardChunks, state: Tensor, grad_state: Tensor, like: DeltaInputs
) -> DeltaGradients:
    """Gradients of the inputs.

    Args:
        state: [R, H, K, V], the state that entered.
        grad_state: [R, H, K, V], gradient of the state that left.
        like: the inputs, whose shapes and dtypes the gradients get.
    """
    chunks, grad_out = x.forward, x.grad_out
    states, new = _states(chunks, state)
    after, written = [], []
    for n in reversed(range(new.shape[2])):
        after.append(grad_state)
        grad_state, grad_new = _step_back(chunks, n, grad_state, x.read, x.new)
        written.append(grad_new)
    d_after, d_new = (torch.stack(parts[::-1], dim=2) for parts in (after, written))

    d_entering = grad_out @ states.mT  # of enter * q
    d_leaving = new @ d_after.mT  # of leave * k
    d_through = (states * d_after).sum(-1) * chunks.through[..., 0]
    d_u, d_w = d_new, -(d_new @ states.mT)
    d_written = torch.linalg.solve_triangular(
        chunks.erase.mT, torch.cat((d_u, d_w), dim=-1), upper=True, unitriangular=True
    )
    d_erase = -(d_written @ torch.cat((chunks.u, chunks.w), dim=-1).mT).tril(-1)
    d_bv, d_bk = d_written.split((chunks.v.shape[-1], chunks.k.shape[-1]), dim=-1)

    q, k, beta, decay = chunks.q, chunks.k, chunks.beta, chunks.decay
    reading, read = decay.scores_backward(grad_out @ new.mT, q, k)
    erasing, erased = decay.scores_backward(d_erase, beta * k, k)
    entering, leaving = decay.enter * d_entering, decay.leave * d_leaving
    writing = decay.enter * d_bk
    d_q = reading + entering
    d_k = read + erased + leaving + beta * (erasing + writing)
    d_beta = ((erasing + writing) * k).sum(-1) + (d_bv * chunks.v).sum(-1)

    # Decays are exponentials of differences of one running sum: what a token reads has a positive
    # share in the sum's gradient at that token, what others read of the token a negative one.
    d_sum = d_q * q + beta * (erasing + writing) * k - (read + erased + leaving) * k
    d_sum[..., -1, :] += d_through + (leaving * k).sum(-2)
    return _gradients(like, d_q, d_k, beta * d_bv, d_sum, d_beta)


def _gradients(
    like: DeltaInputs, d_q: Tensor, d_k: Tensor, d_v: Tensor, d_sum: Tensor, d_beta: Tensor
) -> DeltaGradients:
    """From chunks back to the shapes and dtypes of the inputs."""
    length, key_heads = like.v.shape[1], like.k.shape[2]
    d_g = decay_gradient(d_sum, like.g, like.starts)
    d_q, d_k = (summed_per_head(in_tokens(x, length), key_heads) for x in (d_q, d_k))
    grads = (d_q, d_k, in_tokens(d_v, length), d_g, in_tokens(d_beta[..., None], length)[..., 0])
    return DeltaGradients(*(x.to(part.dtype) for x, part in zip(grads, like, strict=False)))


def _solve(erase: Tensor, written: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    solved = torch.linalg.solve_triangular(erase, written, upper=False, unitriangular=True)
    u, w = solved.split((value_dim, written.shape[-1] - value_dim), dim=-1)
    return u, w


def _states(x: Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state that enters each chunk, and what each token writes."""
    states, written = [], []
    for n in range(x.u.shape[2]):
        new = x.u[:, :, n] - x.w[:, :, n] @ state
        states.append(state)
        written.append(new)
        state = _step(x, n, new, state)
    return torch.stack(states, dim=2), torch.stack(written, dim=2)


def _step(x: Chunks, n: int, new: Tensor, state: Tensor) -> Tensor:
    """The state after chunk n."""
    kept = (x.decay.leave[:, :, n] * x.k[:, :, n]).mT
    return x.through[:, :, n] * state + kept @ new


def _step_back(x: Chunks, n: int, grad: Tensor, read: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the state before chunk n, and of what its tokens write."""
    grad_new = new[:, :, n] + (x.decay.leave[:, :, n] * x.k[:, :, n]) @ grad
    before = read[:, :, n] + x.through[:, :, n] * grad - x.w[:, :, n].mT @ grad_new
    return before, grad_new


def _zero_state(x: Chunks) -> Tensor:
    return x.u.new_zeros(*x.u.shape[:2], x.k.shape[-1], x.v.shape[-1])


def _identity(x: Chunks) -> Tensor:
    """The identity map of the state, [I | 0]: [R, H, K, K + V]."""
    rows, heads, key_dim = x.k.shape[0], x.k.shape[1], x.k.shape[-1]
    eye = torch.eye(key_dim, key_dim + x.v.shape[-1], dtype=x.v.dtype, device=x.v.device)
    return eye.expand(rows, heads, -1, -1)
