"""The gated delta rule by fla-core's kernels.

Called below fla's public functions, which switch the compiler off and take one row at a time.
Segments are rows, and documents are written into the decay: a first token keeps exp(-32) of what
came before. So no kernel reads document lengths from the device, and no packing compiles anew.

Written against fla-core 0.6, which is imported where it is called: api.py chooses this backend
only where fla is installed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dtcp.kernels.delta_rule.fla_inside import inside_chunks_in_torch, is_guarded
from dtcp.kernels.delta_rule.types import Carry, DeltaGradients, DeltaInputs, carried

FORGET = -32.0
"""Log-decay at a document's start: 1e-14 is left, and sums over a chunk keep their digits."""

CHUNK = 64
TO_LOG2 = 1.4426950408889634
MOST_PLACES = 2**31


class PreparedChunks(NamedTuple):
    """What forward and backward both compute first."""

    x: DeltaInputs  # padded to whole chunks, in one dtype
    decay: Tensor  # [R, T, H], running sum of log2-decay in each chunk
    w: Tensor  # [R, T, H, K]
    u: Tensor  # [R, T, H, V]
    solved: Tensor  # [R, T, H, C]
    # q and k as states are read and written by them: with a decay by channel, decayed from and to
    # the chunk's ends.
    reading: Tensor  # [R, T, H, K]
    writing: Tensor  # [R, T, H, K]
    scores: Tensor | None = None  # [R, T, H, C], products of the two, with a decay by channel


class PreparedBackward(NamedTuple):
    """What backward computes before states are carried."""

    chunks: PreparedChunks
    grad: Tensor  # [R, T, H, V], of the output
    state: Tensor  # [R, H, K, V], that entered
    h: Tensor  # [R, N, H, K, V], that enters each chunk
    new: Tensor  # [R, T, H, V], what each token writes
    d_new: Tensor  # [R, T, H, V], its gradient by the chunk's own output
    d_scores: Tensor | None = None  # [R, T, H, C], with a decay by channel


class FlaDeltaRule:
    """`DeltaKernel` by fla's kernels; states and summaries are fp32."""

    decay_name = "g"
    """What fla calls a decay by head; one by channel is gk."""

    def forward(
        self, parts: Sequence[DeltaInputs], carry: Carry | None
    ) -> tuple[list[Tensor], Tensor]:
        prepared = [self._prepare(x) for x in parts]
        states = carried(carry, lambda: [self._summary(chunks) for chunks in prepared])
        states = states or [_zero_state(chunks) for chunks in prepared]
        each = zip(prepared, states, parts, strict=True)
        return [self._read(*of_part) for of_part in each], torch.cat(states)

    def backward(
        self,
        parts: Sequence[DeltaInputs],
        grads_out: Sequence[Tensor],
        state: Tensor,
        carry: Carry | None,
    ) -> list[DeltaGradients]:
        entered = state.split([len(x.v) for x in parts])
        each = zip(parts, grads_out, entered, strict=True)
        prepared = [self._prepare_backward(*of_part) for of_part in each]
        grads = carried(carry, lambda: [self._summary_backward(chunks) for chunks in prepared])
        finals: Sequence[Tensor | None] = grads or [None] * len(parts)
        of_parts = zip(parts, prepared, finals, strict=True)
        return [self._differentiate(*of_part) for of_part in of_parts]

    def _states(self, chunks: PreparedChunks, state: Tensor) -> tuple[Tensor, Tensor]:
        """The state that enters each chunk, and what each token writes."""
        from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h

        decay = {self.decay_name: chunks.decay}
        h, new, _ = chunk_gated_delta_rule_fwd_h(
            k=chunks.writing, w=chunks.w, u=chunks.u, **decay, initial_state=state
        )
        return h, new

    def _read(self, chunks: PreparedChunks, state: Tensor, x: DeltaInputs) -> Tensor:
        from fla.ops.common.chunk_o import chunk_fwd_o

        h, new = self._states(chunks, state)
        out = chunk_fwd_o(q=chunks.x.q, k=chunks.x.k, v=new, h=h, g=chunks.decay, scale=1.0)
        return out[:, : x.v.shape[1]].to(x.v.dtype)

    def _prepare_backward(
        self, x: DeltaInputs, grad_out: Tensor, state: Tensor
    ) -> PreparedBackward:
        from fla.ops.common.chunk_o import chunk_bwd_dv_local

        chunks = self._prepare(x)
        grad = whole_chunks(grad_out.to(chunks.x.v.dtype))
        h, new = self._states(chunks, state)
        d_new = chunk_bwd_dv_local(q=chunks.x.q, k=chunks.x.k, g=chunks.decay, do=grad, scale=1.0)
        return PreparedBackward(chunks, grad, state, h, new, d_new)

    def _differentiate(
        self, x: DeltaInputs, prepared: PreparedBackward, d_final: Tensor | None
    ) -> DeltaGradients:
        from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_dhu
        from fla.ops.gated_delta_rule.wy_fast import prepare_wy_repr_bwd
        from fla.ops.utils import chunk_local_cumsum

        chunks, grad, state, h, new, d_new, _ = prepared
        q, k, v, _, beta, _ = chunks.x
        d_h, _, d_new = chunk_gated_delta_rule_bwd_dhu(
            q=q,
            k=k,
            w=chunks.w,
            g=chunks.decay,
            h0=state,
            dht=d_final,
            do=grad,
            dv=d_new,
            scale=1.0,
        )
        dq, dk, dw, dg = _inside_chunks(chunks, new=new, h=h, grad=grad, d_h=d_h, d_new=d_new)
        dk_write, dv, d_beta, dg_write = prepare_wy_repr_bwd(
            k=k, v=v, beta=beta, g=chunks.decay, A=chunks.solved, dw=dw, du=d_new
        )
        dg = chunk_local_cumsum(dg + dg_write, chunk_size=CHUNK, reverse=True)
        length = x.v.shape[1]
        dg = dg[:, :length].masked_fill(x.starts[..., None] != 0, 0)
        parts = (dq[:, :length], (dk + dk_write)[:, :length], dv[:, :length], dg)
        grads = (*parts, d_beta[:, :length])
        return DeltaGradients(*(g.to(like.dtype) for g, like in zip(grads, x, strict=False)))

    def _prepare(self, x: DeltaInputs) -> PreparedChunks:
        from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
        from fla.ops.utils import chunk_local_cumsum

        g = x.g.float().masked_fill(x.starts[..., None] != 0, FORGET)
        # Unless all are contiguous and in one dtype, gradients are wrong: fla does not check.
        q, k, v, beta = (whole_chunks(part.to(x.v.dtype)) for part in (x.q, x.k, x.v, x.beta))
        decay = chunk_local_cumsum(whole_chunks(g), chunk_size=CHUNK, scale=TO_LOG2)
        w, u, solved = chunk_gated_delta_rule_fwd_intra(k=k, v=v, g=decay, beta=beta)
        padded = DeltaInputs(q, k, v, g, beta, x.starts)
        return PreparedChunks(padded, decay, w, u, solved, reading=q, writing=k)

    def _summary(self, chunks: PreparedChunks) -> Tensor:
        """The summary [M | b] of every row, in one launch."""
        from fla.ops.cp.chunk_fwd import chunk_cp_fwd_h

        ends = _piece_ends(chunks.w, chunks.u)
        summary = _empty_summaries(chunks, len(ends) - 1)
        parts = (chunks.writing, chunks.w, chunks.u, chunks.decay)
        k, w, u, g = (one_row(part) for part in parts)
        decay = {self.decay_name: g}
        chunk_cp_fwd_h(k=k, w=w, u=u, hm=summary, **decay, cu_seqlens=ends, multi_seqs=True)
        pieces = _transition_first(summary, chunks.u.shape[-1])
        return of_whole_rows(pieces.unflatten(0, (len(chunks.u), -1)))

    def _summary_backward(self, prepared: PreparedBackward) -> Tensor:
        """The summary [M^T | b] of every row, for gradients of states."""
        from fla.ops.cp.chunk_bwd import chunk_cp_bwd_dh

        chunks, grad, d_new = prepared.chunks, prepared.grad, prepared.d_new
        ends = _piece_ends(chunks.w, chunks.u)
        summary = _empty_summaries(chunks, len(ends) - 1)
        parts = (chunks.reading, chunks.writing, chunks.w, grad, d_new, chunks.decay)
        q, k, w, do, dv, g = (one_row(part) for part in parts)
        decay = {self.decay_name: g}
        for row in range(len(summary)):
            chunk_cp_bwd_dh(
                q=q,
                k=k,
                w=w,
                do=do,
                dv=dv,
                dhm=summary[row],
                **decay,
                scale=1.0,
                cu_seqlens=ends[row : row + 2],
            )
        pieces = _transition_first(summary, chunks.u.shape[-1])
        return of_whole_rows(pieces.unflatten(0, (len(chunks.u), -1)).flip(1))


def _inside_chunks(
    chunks: PreparedChunks, *, new: Tensor, h: Tensor, grad: Tensor, d_h: Tensor, d_new: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, w and of the running sum of the decay, from those of the states."""
    x = {"new": new, "h": h, "grad": grad, "d_h": d_h, "d_new": d_new}
    if is_guarded():
        return inside_chunks_in_torch(chunks.x.q, chunks.x.k, chunks.decay, **x)
    from fla.ops.common.chunk_o import chunk_bwd_dqkwg

    grads = chunk_bwd_dqkwg(
        q=chunks.x.q,
        k=chunks.x.k,
        v=new,
        w=chunks.w,
        g=chunks.decay,
        h=h,
        dv=d_new,
        do=grad,
        dh=d_h,
        scale=1.0,
    )
    return grads


def whole_chunks(x: Tensor) -> Tensor:
    """[R, T, ...] padded with zeros to whole chunks, contiguous; x itself where it is both."""
    missing = -x.shape[1] % CHUNK
    # Torch copies where there is nothing to pad, too.
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x
    return x.contiguous()


def one_row(x: Tensor) -> Tensor:
    """[R, T, ...] -> [1, R * T, ...], contiguous."""
    return x.contiguous().flatten(0, 1)[None]


def _piece_ends(w: Tensor, u: Tensor) -> Tensor:
    """Where the pieces of rows start whose summaries fla's kernels make, and where the last ends.

    A row is one piece, unless it is longer than their places in 32 bits reach: they count tokens,
    heads and channels from its first token on, and past that would read elsewhere without a word.
    """
    rows, length, heads, key_dim = w.shape
    chunks = length // CHUNK
    most = max(1, MOST_PLACES // (heads * max(key_dim, u.shape[-1]) * CHUNK))
    number = max(1, -(-chunks // most))
    index = torch.arange(rows * number + 1, device=w.device)
    return index // number * length + index % number * chunks // number * CHUNK


def of_whole_rows(pieces: Tensor) -> Tensor:
    """The summaries [M | b] of rows from those of their pieces in order, [R, N, H, K, K + V]."""
    whole, *others = pieces.unbind(1)
    for each in others:
        through, written = each.tensor_split((each.shape[-2],), dim=-1)
        whole = through @ whole
        whole[..., each.shape[-2] :] += written
    return whole


def _empty_summaries(chunks: PreparedChunks, number: int) -> Tensor:
    """[number, H, K, V + K] fp32 zeros, where fla's kernels write [b | M]."""
    _, _, heads, key_dim = chunks.w.shape
    return chunks.u.new_zeros(
        number, heads, key_dim, key_dim + chunks.u.shape[-1], dtype=torch.float32
    )


def _transition_first(summary: Tensor, value_dim: int) -> Tensor:
    """fla's [b | M] as [M | b]."""
    state, transition = summary.split((value_dim, summary.shape[-1] - value_dim), dim=-1)
    return torch.cat((transition, state), dim=-1)


def _zero_state(chunks: PreparedChunks) -> Tensor:
    rows, _, heads, key_dim = chunks.w.shape
    return chunks.u.new_zeros(rows, heads, key_dim, chunks.u.shape[-1], dtype=torch.float32)
