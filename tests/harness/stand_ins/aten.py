"""FlashAttention 2 and cuDNN as torch has them: torch.ops.aten."""

import torch
from torch import Tensor

from tests.harness.dense_attention import dense_backward, dense_forward, seen_under
from tests.harness.stand_ins.conventions import (
    attend,
    attend_backward,
    blind_inf,
    lengths_of,
    level_of,
    window_of,
)

NOT_IN_2_11 = ("block_table", "num_splits")
"""Arguments that torch 2.11 has not, and that are never passed."""


class AtenOps:
    """FlashAttention 2 and cuDNN as torch has them; parameters as in their schemas."""

    @staticmethod
    def _flash_attention_forward(
        query,
        key,
        value,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        return_debug_mask,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
        seqused_k=None,
        alibi_slopes=None,
        block_table=None,
        num_splits=None,
    ):
        """lse is inf for a query without keys."""
        assert (dropout_p, return_debug_mask) == (0.0, False)
        assert all(x is None for x in (seqused_k, alibi_slopes, block_table, num_splits))
        window = window_of(is_causal, window_size_left, window_size_right)
        lengths = None
        if cum_seq_q is not None:
            lengths = lengths_of(cum_seq_q, cum_seq_k, max_q, max_k, query, key)
        else:
            assert (max_q, max_k) == (query.shape[1], key.shape[1])
        out, lse = attend(query, key, value, window, lengths, None, scale, 0.0)
        unused = torch.zeros(2, dtype=torch.uint64)
        return out, blind_inf(lse), unused, unused, query.new_empty(0)

    @staticmethod
    def _flash_attention_backward(
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        rng_state,
        unused,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
    ):
        assert dropout_p == 0.0
        assert isinstance(rng_state, Tensor) and isinstance(unused, Tensor)
        window = window_of(is_causal, window_size_left, window_size_right)
        lengths = None
        if cum_seq_q is not None:
            lengths = lengths_of(cum_seq_q, cum_seq_k, max_q, max_k, query, key)
        given = (grad_out, query, key, value, out, logsumexp)
        return attend_backward(*given, window, lengths, None, scale, 0.0)

    @staticmethod
    def _scaled_dot_product_cudnn_attention(
        query,
        key,
        value,
        attn_bias,
        compute_log_sumexp,
        dropout_p=0.0,
        is_causal=False,
        return_debug_mask=False,
        *,
        scale=None,
    ):
        """Heads first; lse [B, H, L, 1]; causal to the top left corner."""
        assert (attn_bias, dropout_p, return_debug_mask) == (None, 0.0, False)
        assert compute_log_sumexp
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        right = 0 if is_causal else None
        seen = seen_under(q.shape[1], k.shape[1], None, right, top_left=True)
        out, lse = dense_forward(q, k, v, seen, scale, 0.0)
        nothing = torch.zeros(1, dtype=torch.int64)
        rest = (None, None, q.shape[1], k.shape[1], nothing, nothing, None)
        return out.transpose(1, 2).to(query.dtype), level_of(lse, query)[..., None], *rest

    @staticmethod
    def _scaled_dot_product_cudnn_attention_backward(
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp,
        philox_seed,
        philox_offset,
        attn_bias,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        *,
        scale=None,
    ):
        assert (attn_bias, cum_seq_q, cum_seq_k, dropout_p) == (None, None, None, 0.0)
        assert isinstance(philox_seed, Tensor) and isinstance(philox_offset, Tensor)
        grad, q, k, v, o = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        assert logsumexp.shape == (*query.shape[:3], 1)
        right = 0 if is_causal else None
        seen = seen_under(q.shape[1], k.shape[1], None, right, top_left=True)
        grads = dense_backward(grad, q, k, v, o, logsumexp[..., 0], seen, scale, 0.0)
        return tuple(
            x.transpose(1, 2).to(like.dtype)
            for x, like in zip(grads, (query, key, value), strict=True)
        )
