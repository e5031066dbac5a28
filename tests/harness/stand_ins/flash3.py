"""FlashAttention 3: flash_attn_interface, as of the hopper folder of Dao-AILab/flash-attention."""

import torch

from tests.harness.stand_ins.conventions import (
    attend,
    attend_backward,
    bound_of,
    check_only_defaults,
    lengths_of,
    window_of,
)


def flash3_forward(
    q,
    k,
    v,
    k_new=None,
    v_new=None,
    qv=None,
    out_=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    cu_seqlens_k_new=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    page_table=None,
    kv_batch_idx=None,
    leftpad_k=None,
    rotary_cos=None,
    rotary_sin=None,
    seqlens_rotary=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size_left=-1,
    window_size_right=-1,
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=1,
    pack_gqa=None,
    sm_margin=0,
):
    """lse is -inf for a query without keys."""
    check_only_defaults(flash3_forward, locals(), FLASH3_USED)
    window = window_of(causal, bound_of(window_size_left), bound_of(window_size_right))
    lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    out, lse = attend(q, k, v, window, lengths, None, softmax_scale, softcap)
    nothing = torch.tensor([])
    return out, lse, nothing, nothing


def flash3_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    sequed_q=None,
    sequed_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    dq=None,
    dk=None,
    dv=None,
    softmax_scale=None,
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
):
    check_only_defaults(flash3_backward, locals(), FLASH3_USED)
    window = window_of(is_causal, bound_of(window_size_left), bound_of(window_size_right))
    lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    given = (dout, q, k, v, out, softmax_lse)
    grads = attend_backward(*given, window, lengths, None, softmax_scale, softcap)
    for room, grad in zip((dq, dk, dv), grads, strict=True):
        room.copy_(grad)
    return softmax_lse.new_zeros(softmax_lse.shape)


FLASH3_USED = {
    *("q", "k", "v", "out", "dout", "softmax_lse", "dq", "dk", "dv", "deterministic"),
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale"),
    *("causal", "is_causal", "softcap", "window_size_left", "window_size_right"),
}
