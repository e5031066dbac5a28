"""FlashAttention 2: flash_attn.flash_attn_interface, as of flash-attn 2.8.3."""

import torch

from tests.harness.stand_ins.conventions import (
    attend,
    attend_backward,
    blind_inf,
    bound_of,
    check_only_defaults,
    lengths_of,
    window_of,
)


def flash2_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    return_softmax,
):
    """lse is inf for a query without keys."""
    assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
    window = window_of(causal, bound_of(window_size_left), bound_of(window_size_right))
    out, lse = attend(q, k, v, window, None, None, softmax_scale, softcap)
    return out, blind_inf(lse), q.new_empty(0), torch.zeros(2, dtype=torch.int64)


def flash2_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
):
    assert dropout_p == 0.0
    check_only_defaults(flash2_varlen_forward, locals(), FLASH2_USED)
    window = window_of(causal, bound_of(window_size_left), bound_of(window_size_right))
    lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    out, lse = attend(q, k, v, window, lengths, None, softmax_scale, softcap)
    return out, blind_inf(lse), q.new_empty(0), torch.zeros(2, dtype=torch.int64)


def flash2_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    assert (dropout_p, alibi_slopes, rng_state) == (0.0, None, None)
    window = window_of(causal, bound_of(window_size_left), bound_of(window_size_right))
    given = (dout, q, k, v, out, softmax_lse)
    grads = attend_backward(*given, window, None, None, softmax_scale, softcap)
    for room, grad in zip((dq, dk, dv), grads, strict=True):
        room.copy_(grad)
    return softmax_lse.new_zeros(softmax_lse.shape)


def flash2_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    assert (dropout_p, alibi_slopes, rng_state) == (0.0, None, None)
    window = window_of(causal, bound_of(window_size_left), bound_of(window_size_right))
    lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    given = (dout, q, k, v, out, softmax_lse)
    grads = attend_backward(*given, window, lengths, None, softmax_scale, softcap)
    for room, grad in zip((dq, dk, dv), grads, strict=True):
        room.copy_(grad)
    return softmax_lse.new_zeros(softmax_lse.shape)


FLASH2_USED = {
    *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p"),
    *("softmax_scale", "causal", "softcap", "window_size_left", "window_size_right"),
}
