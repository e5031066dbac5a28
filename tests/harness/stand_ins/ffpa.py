"""ffpa-attn 0.2.4: torch.ops.ffpa_attn, registered by ffpa_attn.cute."""

from tests.harness.stand_ins.conventions import attend, attend_backward, lengths_of, window_of

NO_WINDOW = -(2**31)


class FFPAOps:
    """Causal to the bottom right corner; a bound of NO_WINDOW is none, and -1 is a window."""

    @staticmethod
    def _fwd_cute(q, k, v, softmax_scale, causal, return_lse):
        assert isinstance(causal, int) and return_lse == 1
        window = window_of(bool(causal), None, None)
        return attend(q, k, v, window, None, None, softmax_scale, 0.0)

    @staticmethod
    def _bwd_cute(dout, q, k, v, out, lse, softmax_scale, causal, grad_kv_storage_dtype_code):
        assert grad_kv_storage_dtype_code == 0
        window = window_of(bool(causal), None, None)
        return attend_backward(dout, q, k, v, out, lse, window, None, None, softmax_scale, 0.0)

    @staticmethod
    def _varlen_fwd_cute(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        pack_gqa,
    ):
        assert (window_size_left, window_size_right, softcap) == (NO_WINDOW, NO_WINDOW, 0.0)
        assert pack_gqa == (q.shape[-2] > k.shape[-2])
        lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
        window = window_of(causal, None, None)
        return attend(q, k, v, window, lengths, None, softmax_scale, 0.0)

    @staticmethod
    def _varlen_bwd_cute(
        q,
        k,
        v,
        out,
        dout,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        dlse,
    ):
        assert (window_size_left, window_size_right) == (NO_WINDOW, NO_WINDOW)
        assert (softcap, dlse) == (0.0, None)
        lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
        window = window_of(causal, None, None)
        return attend_backward(dout, q, k, v, out, lse, window, lengths, None, softmax_scale, 0.0)
