"""Stand-ins for the kernels of others: their signatures, layouts and conventions, fp64 on a CPU.

A parameter that is not computed with may only be given its default. What a real kernel would
refuse, these refuse: layouts, dtypes of lengths, shapes of block lists, lse that is not finite.

    python -m tests.harness.stand_ins     # compare with the packages that are installed here

Written from flash-attn-4 4.0.0b36, flash-attn 2.8.3, the hopper folder of
Dao-AILab/flash-attention (FlashAttention 3), ffpa-attn 0.2.4, and torch's own schemas.
"""

import inspect
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.harness.dense_attention import dense_backward, dense_forward, seen_under


class Sparsity(NamedTuple):
    """flash_attn.cute.block_sparsity.BlockSparseTensorsTorch."""

    mask_block_cnt: Any
    mask_block_idx: Any
    full_block_cnt: Any = None
    full_block_idx: Any = None
    cu_total_m_blocks: Any = None
    cu_block_idx_offsets: Any = None
    block_size: Any = None
    dq_write_order: Any = None
    dq_write_order_full: Any = None
    spt: Any = None


def interval_mask(
    batch: Any, head: Any, query: Any, key: Any, seqlen_info: Any, aux_tensors: Any
) -> Any:
    """The mask function, on index tensors that broadcast."""
    first_key, last_key, token_index = aux_tensors
    index = token_index[key]
    return (first_key[batch, query] <= index) & (index <= last_key[batch, query])


# --- flash-attn-4: flash_attn.cute.interface ---


def flash4_forward(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    softcap=None,
    window_size_left=None,
    window_size_right=None,
    learnable_sink=None,
    tile_mn=None,
    mma_pv_is_rs=None,
    intra_wg_overlap=None,
    num_threads=384,
    num_splits=1,
    pack_gqa=None,
    _arch=None,
    score_mod=None,
    mask_mod=None,
    block_sparse_tensors=None,
    return_lse=False,
    out=None,
    lse=None,
    aux_tensors=None,
    aux_scalars=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    gather_kv_indices=None,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
):
    """lse is -inf for a query without keys."""
    if qv is not None:
        _only_defaults(flash4_forward, locals(), FLASH4_GATHERED)
        assert q is None and k is None and gather_bwd_recompute_p and return_lse
        seen = _gathered(v, qv, gather_kv_indices)
        out, level = dense_forward(qv, v, v, seen, softmax_scale, 0.0)
        return out.to(qv.dtype), _level(level, qv).transpose(1, 2), None, None, None
    _only_defaults(flash4_forward, locals(), FLASH4_USED)
    assert return_lse
    window = _window(causal, window_size_left, window_size_right)
    lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    mask = None
    if mask_mod is not None:
        assert lengths is None and window == (None, None)
        mask = _sparse_mask(q, k, mask_mod, aux_tensors, block_sparse_tensors, transposed=False)
    out, level = _forward(q, k, v, window, lengths, mask, softmax_scale, softcap or 0.0)
    return out, level, None, None, None


def flash4_backward(
    q,
    k,
    v,
    out,
    dout,
    lse,
    softmax_scale=None,
    causal=False,
    softcap=0.0,
    window_size_left=None,
    window_size_right=None,
    m_block_size=64,
    n_block_size=128,
    num_threads=256,
    pack_gqa=False,
    num_stages_Q=2,
    num_stages_dO=2,
    SdP_swapAB=False,
    dKV_swapAB=False,
    dQ_swapAB=False,
    AtomLayoutMSdP=2,
    AtomLayoutNdKV=2,
    AtomLayoutMdQ=2,
    V_in_regs=False,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    deterministic=False,
    dq=None,
    dk=None,
    dv=None,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    aux_tensors=None,
    aux_scalars=None,
    block_sparse_tensors=None,
    dlse=None,
    learnable_sink=None,
):
    _only_defaults(flash4_backward, locals(), FLASH4_USED)
    window = _window(causal, window_size_left, window_size_right)
    lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    mask = None
    if mask_mod is not None:
        assert lengths is None and window == (None, None)
        if deterministic and block_sparse_tensors.dq_write_order is None:
            raise ValueError("deterministic block-sparse backward requires dq_write_order")
        mask = _sparse_mask(q, k, mask_mod, aux_tensors, block_sparse_tensors, transposed=True)
    grads = _backward(dout, q, k, v, out, lse, window, lengths, mask, softmax_scale, softcap)
    for given, grad in zip((dq, dk, dv), grads, strict=True):
        given.copy_(grad)
    return dq, dk, dv


def flash4_sparse_backward(
    q,
    k,
    v,
    qv,
    out,
    dout,
    lse,
    p,
    row_max,
    gather_kv_indices,
    learnable_sink=None,
    softmax_scale=None,
    causal=False,
    m_block_size=128,
    n_block_size=64,
    num_threads=256,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    deterministic=False,
    dq=None,
    dk=None,
    dv=None,
    dqv=None,
    recompute_p=False,
    token_chunk=None,
    o_lo=None,
):
    """Gradients of rows that are keys and values at once, in fp32; lse [B, L, H]."""
    _only_defaults(flash4_sparse_backward, locals(), FLASH4_GATHERED)
    assert q is k is p is row_max is None and recompute_p and token_chunk
    assert qv.shape[0] == 1, "chunks of tokens are of one row"
    assert lse.shape == qv.shape[:3] and lse.isfinite().all()
    assert out.is_contiguous() and dout.is_contiguous() and dout.dtype == qv.dtype
    seen, level = _gathered(v, qv, gather_kv_indices), lse.transpose(1, 2)
    dqv, dk, dv = dense_backward(dout, qv, v, v, out, level, seen, softmax_scale, 0.0)
    return None, None, (dk + dv).to(_level(dk, v).dtype), dqv.to(qv.dtype), None


def _gathered(v: Tensor, qv: Tensor, indices: Tensor) -> Tensor:
    """Which rows each query reads, [B, L, K] bool; -1 stands for none."""
    assert v.shape[2] == 1 and v.shape[-1] == qv.shape[-1] and 0 < qv.shape[2] <= 128
    assert indices.dtype == torch.int32 and indices.shape[:2] == qv.shape[:2]
    assert indices.shape[-1] % 128 == 0 and indices.max() < v.shape[1] and indices.min() >= -1
    seen = torch.zeros(*qv.shape[:2], v.shape[1] + 1, dtype=torch.int32)
    seen.scatter_add_(2, indices.long().where(indices >= 0, v.shape[1]), torch.ones_like(indices))
    assert seen[..., :-1].max() <= 1, "no row is gathered twice"
    return seen[..., :-1] == 1


FLASH4_GATHERED = {
    *("q", "k", "v", "qv", "out", "dout", "lse", "p", "row_max", "gather_kv_indices"),
    *("softmax_scale", "return_lse", "gather_bwd_recompute_p", "recompute_p", "token_chunk"),
}
FLASH4_USED = {
    *("q", "k", "v", "out", "dout", "lse", "dq", "dk", "dv", "deterministic"),
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "return_lse"),
    *("softmax_scale", "causal", "softcap", "window_size_left", "window_size_right"),
    *("mask_mod", "aux_tensors", "block_sparse_tensors"),
}


# --- FlashAttention 3: flash_attn_interface ---


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
    _only_defaults(flash3_forward, locals(), FLASH3_USED)
    window = _window(causal, _bound(window_size_left), _bound(window_size_right))
    lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    out, lse = _forward(q, k, v, window, lengths, None, softmax_scale, softcap)
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
    _only_defaults(flash3_backward, locals(), FLASH3_USED)
    window = _window(is_causal, _bound(window_size_left), _bound(window_size_right))
    lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    given = (dout, q, k, v, out, softmax_lse)
    grads = _backward(*given, window, lengths, None, softmax_scale, softcap)
    for room, grad in zip((dq, dk, dv), grads, strict=True):
        room.copy_(grad)
    return softmax_lse.new_zeros(softmax_lse.shape)


FLASH3_USED = {
    *("q", "k", "v", "out", "dout", "softmax_lse", "dq", "dk", "dv", "deterministic"),
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale"),
    *("causal", "is_causal", "softcap", "window_size_left", "window_size_right"),
}


# --- FlashAttention 2: flash_attn.flash_attn_interface ---


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
    window = _window(causal, _bound(window_size_left), _bound(window_size_right))
    out, lse = _forward(q, k, v, window, None, None, softmax_scale, softcap)
    return out, _blind_inf(lse), q.new_empty(0), torch.zeros(2, dtype=torch.int64)


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
    _only_defaults(flash2_varlen_forward, locals(), FLASH2_USED)
    window = _window(causal, _bound(window_size_left), _bound(window_size_right))
    lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    out, lse = _forward(q, k, v, window, lengths, None, softmax_scale, softcap)
    return out, _blind_inf(lse), q.new_empty(0), torch.zeros(2, dtype=torch.int64)


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
    window = _window(causal, _bound(window_size_left), _bound(window_size_right))
    given = (dout, q, k, v, out, softmax_lse)
    grads = _backward(*given, window, None, None, softmax_scale, softcap)
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
    window = _window(causal, _bound(window_size_left), _bound(window_size_right))
    lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    given = (dout, q, k, v, out, softmax_lse)
    grads = _backward(*given, window, lengths, None, softmax_scale, softcap)
    for room, grad in zip((dq, dk, dv), grads, strict=True):
        room.copy_(grad)
    return softmax_lse.new_zeros(softmax_lse.shape)


FLASH2_USED = {
    *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p"),
    *("softmax_scale", "causal", "softcap", "window_size_left", "window_size_right"),
}


# --- torch.ops.aten ---


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
        window = _window(is_causal, window_size_left, window_size_right)
        lengths = None
        if cum_seq_q is not None:
            lengths = _lengths(cum_seq_q, cum_seq_k, max_q, max_k, query, key)
        else:
            assert (max_q, max_k) == (query.shape[1], key.shape[1])
        out, lse = _forward(query, key, value, window, lengths, None, scale, 0.0)
        unused = torch.zeros(2, dtype=torch.uint64)
        return out, _blind_inf(lse), unused, unused, query.new_empty(0)

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
        window = _window(is_causal, window_size_left, window_size_right)
        lengths = None
        if cum_seq_q is not None:
            lengths = _lengths(cum_seq_q, cum_seq_k, max_q, max_k, query, key)
        given = (grad_out, query, key, value, out, logsumexp)
        return _backward(*given, window, lengths, None, scale, 0.0)

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
        return out.transpose(1, 2).to(query.dtype), _level(lse, query)[..., None], *rest

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


# --- ffpa-attn: torch.ops.ffpa_attn, registered by ffpa_attn.cute ---


class FFPAOps:
    """Causal to the bottom right corner; a window of -1 is none."""

    @staticmethod
    def _fwd_cute(q, k, v, softmax_scale, causal, return_lse):
        assert isinstance(causal, int) and return_lse == 1
        window = _window(bool(causal), None, None)
        return _forward(q, k, v, window, None, None, softmax_scale, 0.0)

    @staticmethod
    def _bwd_cute(dout, q, k, v, out, lse, softmax_scale, causal, grad_kv_storage_dtype_code):
        assert grad_kv_storage_dtype_code == 0
        window = _window(bool(causal), None, None)
        return _backward(dout, q, k, v, out, lse, window, None, None, softmax_scale, 0.0)

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
        assert (window_size_left, window_size_right, softcap) == (-1, -1, 0.0)
        lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
        window = _window(causal, None, None)
        return _forward(q, k, v, window, lengths, None, softmax_scale, 0.0)

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
        assert (window_size_left, window_size_right, softcap, dlse) == (-1, -1, 0.0, None)
        lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
        window = _window(causal, None, None)
        return _backward(dout, q, k, v, out, lse, window, lengths, None, softmax_scale, 0.0)


# --- what they share ---


def _only_defaults(function: Callable[..., Any], given: dict[str, Any], used: set[str]) -> None:
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in used:
            assert given[name] is parameter.default or given[name] == parameter.default, name


def _bound(size: int) -> int | None:
    return None if size < 0 else size


def _window(causal: bool, left: int | None, right: int | None) -> tuple[int | None, int | None]:
    return left, 0 if causal else right


def _lengths(
    cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int, q: Tensor, k: Tensor
) -> list[tuple[slice, slice]] | None:
    """The queries and keys of each sequence; None where rows are not packed."""
    if cu_q is None:
        assert q.dim() == k.dim() == 4
        return None
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert q.dim() == k.dim() == 3 and cu_q.shape == cu_k.shape
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for bounds, longest, x in ((bounds_q, max_q, q), (bounds_k, max_k, k)):
        assert bounds[0] == 0 and bounds[-1] == len(x)
        assert max(b - a for a, b in pairwise(bounds)) <= longest
    return [
        (slice(*of_q), slice(*of_k))
        for of_q, of_k in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True)
    ]


def _level(lse: Tensor, like: Tensor) -> Tensor:
    """lse in fp32, or in fp64 where a test computes in that."""
    return lse if like.dtype == torch.float64 else lse.float()


def _blind_inf(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: tuple[int | None, int | None],
    lengths: list[tuple[slice, slice]] | None,
    mask: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """out like q and lse [B, H, L]; packed, [T, H, V] and [H, T]."""
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    if lengths is None:
        seen = seen_under(q.shape[1], k.shape[1], *window) if mask is None else mask
        out, lse = dense_forward(q, k, v, seen, scale, softcap)
        return out.to(q.dtype), _level(lse, q)
    out = torch.full((*q.shape[:-1], v.shape[-1]), torch.nan, dtype=torch.float64)
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan, dtype=torch.float64)
    for of_q, of_k in lengths:
        seen = seen_under(of_q.stop - of_q.start, of_k.stop - of_k.start, *window)
        one = dense_forward(q[None, of_q], k[None, of_k], v[None, of_k], seen, scale, softcap)
        out[of_q], lse[:, of_q] = one[0][0], one[1][0]
    return out.to(q.dtype), _level(lse, q)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: tuple[int | None, int | None],
    lengths: list[tuple[slice, slice]] | None,
    mask: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    assert q.dtype == k.dtype == v.dtype == out.dtype == grad_out.dtype
    assert lse.isfinite().all() and lse.dtype == _level(lse.double(), q).dtype
    if lengths is None:
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        seen = seen_under(q.shape[1], k.shape[1], *window) if mask is None else mask
        grads = dense_backward(grad_out, q, k, v, out, lse, seen, scale, softcap)
    else:
        assert lse.shape == (q.shape[1], q.shape[0])
        grads = tuple(torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v))
        for of_q, of_k in lengths:
            seen = seen_under(of_q.stop - of_q.start, of_k.stop - of_k.start, *window)
            one = dense_backward(
                *(grad_out[None, of_q], q[None, of_q], k[None, of_k], v[None, of_k]),
                *(out[None, of_q], lse[None, :, of_q], seen, scale, softcap),
            )
            for whole, part, cut in zip(grads, one, (of_q, of_k, of_k), strict=True):
                whole[cut] = part[0]
    dq, dk, dv = (x.to(like.dtype) for x, like in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


def _sparse_mask(
    q: Tensor,
    k: Tensor,
    mask_mod: Callable[..., Tensor],
    aux_tensors: list[Tensor],
    sparsity: Sparsity,
    *,
    transposed: bool,
) -> Tensor:
    """What block lists and the mask function leave: the function is asked in partial blocks only.

    Args:
        transposed: the lists are those of blocks of keys, as backward reads them.
    """
    (rows, length), num_keys = q.shape[:2], k.shape[1]
    first, last, index = aux_tensors
    assert first.shape == last.shape == (rows, length) and index.shape == (num_keys,)
    assert all(x.dtype == torch.int32 for x in aux_tensors)
    sizes = sparsity.block_size
    blocks = [-(-count // size) for count, size in zip((length, num_keys), sizes, strict=True)]
    batch = torch.arange(rows)[:, None, None]
    query, key = torch.arange(length)[:, None], torch.arange(num_keys)
    seen = mask_mod(batch, None, query, key, None, aux_tensors)
    mask = torch.zeros(rows, length, num_keys, dtype=torch.bool)
    lists = (
        (sparsity.mask_block_cnt, sparsity.mask_block_idx, seen),
        (sparsity.full_block_cnt, sparsity.full_block_idx, torch.ones_like(seen)),
    )
    own, other = (blocks[1], blocks[0]) if transposed else blocks
    for counts, indices, part in lists:
        assert counts.dtype == indices.dtype == torch.int32
        assert counts.shape == (rows, 1, own) and indices.shape == (rows, 1, own, other)
        for row in range(rows):
            for block in range(own):
                listed = indices[row, 0, block, : counts[row, 0, block]].tolist()
                assert listed == sorted(set(listed)), "blocks ascend"
                for at in listed:
                    pair = (at, block) if transposed else (block, at)
                    cut = tuple(
                        slice(i * size, (i + 1) * size) for i, size in zip(pair, sizes, strict=True)
                    )
                    mask[row][cut] |= part[row][cut]
    return mask


# --- comparison with what is installed ---

PYTHON_FUNCTIONS = {
    "flash_attn.cute.interface:_flash_attn_fwd": flash4_forward,
    "flash_attn.cute.interface:_flash_attn_bwd": flash4_backward,
    "flash_attn.cute.interface:_flash_attn_bwd_sparse_mla": flash4_sparse_backward,
    "flash_attn.cute.block_sparsity:BlockSparseTensorsTorch": Sparsity,
    "flash_attn_interface:_flash_attn_forward": flash3_forward,
    "flash_attn_interface:_flash_attn_backward": flash3_backward,
    "flash_attn.flash_attn_interface:_flash_attn_forward": flash2_forward,
    "flash_attn.flash_attn_interface:_flash_attn_varlen_forward": flash2_varlen_forward,
    "flash_attn.flash_attn_interface:_flash_attn_backward": flash2_backward,
    "flash_attn.flash_attn_interface:_flash_attn_varlen_backward": flash2_varlen_backward,
}


def signature_drift() -> Iterator[tuple[str, str]]:
    """(name, difference) for each function that can be imported here; '' where there is none."""
    for name, stand_in in PYTHON_FUNCTIONS.items():
        module, _, attribute = name.partition(":")
        try:
            real = getattr(__import__(module, fromlist=[attribute]), attribute)
        except ImportError:
            continue
        # A custom op keeps the function it was made of.
        real = getattr(real, "_init_fn", real)
        yield name, _difference(_parameters(stand_in), _parameters(real))
    try:
        import ffpa_attn.cute  # noqa: F401
    except ImportError:
        namespaces = {"aten": AtenOps}
    else:
        namespaces = {"aten": AtenOps, "ffpa_attn": FFPAOps}
    for namespace, ops in namespaces.items():
        for name, stand_in in vars(ops).items():
            if isinstance(stand_in, staticmethod):
                packet = getattr(getattr(torch.ops, namespace), name)
                schema = [(x.name, x.default_value) for x in packet.default._schema.arguments]
                own = [
                    (each, None if default is inspect.Parameter.empty else default)
                    for each, default in _parameters(stand_in.__func__)
                ]
                yield f"{namespace}::{name}", _difference(own, schema)


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(x.name, x.default) for x in inspect.signature(function).parameters.values()]


def _difference(own: list[tuple[str, Any]], real: list[tuple[str, Any]]) -> str:
    if own == real:
        return ""
    lacking = [x for x in real if x not in own]
    surplus = [x for x in own if x not in real]
    return f"the real one has {lacking}, the stand-in {surplus}" if lacking or surplus else "order"


if __name__ == "__main__":
    for compared, drift in signature_drift():
        print(f"{compared}: {drift or 'the same'}")
