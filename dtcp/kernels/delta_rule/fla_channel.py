"""The delta rule with a decay for each key channel (Kimi delta attention) by fla-core's kernels.

What `fla.ops.kda.chunk_kda` calls, called below it, for the reasons that fla.py gives: its public
function switches the compiler off, and knows no summaries of stretches but those of its own ranks.
Documents are written into the decay. Inside a block of 16 tokens these kernels take differences of
the decay's running sum pair by pair, so a document's start does not overflow there.

Written against fla-core 0.6.
"""

from torch import Tensor

from dtcp.kernels.delta_rule.chunks import summed_per_head
from dtcp.kernels.delta_rule.fla import (
    CHUNK,
    FORGET,
    TO_LOG2,
    FlaDeltaRule,
    PreparedBackward,
    PreparedChunks,
    whole_chunks,
)
from dtcp.kernels.delta_rule.types import DeltaGradients, DeltaInputs


class FlaChannelDeltaRule(FlaDeltaRule):
    """`DeltaKernel` by fla's kernels for decays by channel; states and summaries are fp32."""

    decay_name = "gk"

    def _prepare(self, x: DeltaInputs) -> PreparedChunks:
        from fla.ops.kda.chunk_intra import chunk_kda_fwd_intra
        from fla.ops.utils import chunk_local_cumsum

        g = x.g.float().masked_fill(x.starts[..., None, None] != 0, FORGET)
        q, k, v, beta = (whole_chunks(part.to(x.v.dtype)) for part in (x.q, x.k, x.v, x.beta))
        decay = chunk_local_cumsum(whole_chunks(g), chunk_size=CHUNK, scale=TO_LOG2)
        w, u, reading, writing, scores, solved = chunk_kda_fwd_intra(
            q=q,
            k=k,
            v=v,
            gk=decay,
            beta=beta,
            scale=1.0,
            chunk_size=CHUNK,
            disable_recompute=True,
        )
        whole = DeltaInputs(q, k, v, g, beta, x.starts)
        return PreparedChunks(whole, decay, w, u, solved, reading, writing, scores)

    def _read(self, chunks: PreparedChunks, state: Tensor, x: DeltaInputs) -> Tensor:
        from fla.ops.gla.chunk import chunk_gla_fwd_o_gk

        h, new = self._states(chunks, state)
        out = chunk_gla_fwd_o_gk(
            q=chunks.x.q,
            v=new,
            g=chunks.decay,
            A=chunks.scores,
            h=h,
            scale=1.0,
            chunk_size=CHUNK,
        )
        return out[:, : x.v.shape[1]].to(x.v.dtype)

    def _prepare_backward(
        self, x: DeltaInputs, grad_out: Tensor, state: Tensor
    ) -> PreparedBackward:
        from fla.ops.kda.chunk_bwd import chunk_kda_bwd_dAv

        chunks = self._prepare(x)
        grad = whole_chunks(grad_out.to(chunks.x.v.dtype))
        h, new = self._states(chunks, state)
        d_scores, d_new = chunk_kda_bwd_dAv(
            q=chunks.x.q,
            k=chunks.x.k,
            v=new,
            do=grad,
            A=chunks.scores,
            scale=1.0,
            chunk_size=CHUNK,
        )
        return PreparedBackward(chunks, grad, state, h, new, d_new, d_scores)

    def _differentiate(
        self, x: DeltaInputs, prepared: PreparedBackward, d_final: Tensor | None
    ) -> DeltaGradients:
        from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_dhu
        from fla.ops.kda.chunk_bwd import chunk_kda_bwd_wy_dqkg_fused
        from fla.ops.kda.chunk_intra import chunk_kda_bwd_intra
        from fla.ops.utils import chunk_local_cumsum

        chunks, grad, state, h, new, d_new, d_scores = prepared
        q, k, v, _, beta, _ = chunks.x
        d_h, _, d_new = chunk_gated_delta_rule_bwd_dhu(
            q=chunks.reading,
            k=chunks.writing,
            w=chunks.w,
            gk=chunks.decay,
            h0=state,
            dht=d_final,
            do=grad,
            dv=d_new,
            scale=1.0,
        )
        shared = {"q": q, "k": k, "g": chunks.decay, "beta": beta, "chunk_size": CHUNK}
        dq, dk, dv, d_beta, dg, d_solved = chunk_kda_bwd_wy_dqkg_fused(
            **shared,
            v=v,
            v_new=new,
            A=chunks.solved,
            h=h,
            do=grad,
            dh=d_h,
            dv=d_new,
            scale=1.0,
        )
        dq, dk, d_beta, dg = chunk_kda_bwd_intra(
            **shared, dAqk=d_scores, dAkk=d_solved, dq=dq, dk=dk, db=d_beta, dg=dg
        )
        dq, dk = (summed_per_head(part, k.shape[2]) for part in (dq, dk))
        dg = chunk_local_cumsum(dg, chunk_size=CHUNK, reverse=True)
        length = x.v.shape[1]
        dg = dg[:, :length].masked_fill(x.starts[..., None, None] != 0, 0)
        grads = (dq[:, :length], dk[:, :length], dv[:, :length], dg, d_beta[:, :length])
        return DeltaGradients(*(g.to(like.dtype) for g, like in zip(grads, x, strict=False)))
