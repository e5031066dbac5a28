"""FlashAttention 4: flash_attn.cute.interface, as of flash-attn-4 4.0.0b36."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.harness.dense_attention import dense_backward, dense_forward
from tests.harness.stand_ins.conventions import (
    attend,
    attend_backward,
    check_only_defaults,
    lengths_of,
    level_of,
    window_of,
)


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
        check_only_defaults(flash4_forward, locals(), FLASH4_GATHERED)
        assert q is None and k is None and gather_bwd_recompute_p and return_lse
        seen = _gathered(v, qv, gather_kv_indices)
        out, level = dense_forward(qv, v, v, seen, softmax_scale, 0.0)
        return out.to(qv.dtype), level_of(level, qv).transpose(1, 2), None, None, None
    check_only_defaults(flash4_forward, locals(), FLASH4_USED)
    assert return_lse
    window = window_of(causal, window_size_left, window_size_right)
    lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    mask = None
    if mask_mod is not None:
        assert lengths is None and window == (None, None)
        mask = _sparse_mask(q, k, mask_mod, aux_tensors, block_sparse_tensors, transposed=False)
    out, level = attend(q, k, v, window, lengths, mask, softmax_scale, softcap or 0.0)
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
    check_only_defaults(flash4_backward, locals(), FLASH4_USED)
    window = window_of(causal, window_size_left, window_size_right)
    lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    mask = None
    if mask_mod is not None:
        assert lengths is None and window == (None, None)
        if deterministic and block_sparse_tensors.dq_write_order is None:
            raise ValueError("deterministic block-sparse backward requires dq_write_order")
        mask = _sparse_mask(q, k, mask_mod, aux_tensors, block_sparse_tensors, transposed=True)
    grads = attend_backward(dout, q, k, v, out, lse, window, lengths, mask, softmax_scale, softcap)
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
    check_only_defaults(flash4_sparse_backward, locals(), FLASH4_GATHERED)
    assert q is k is p is row_max is None and recompute_p and token_chunk
    assert qv.shape[0] == 1, "chunks of tokens are of one row"
    assert lse.shape == qv.shape[:3] and lse.isfinite().all()
    assert out.is_contiguous() and dout.is_contiguous() and dout.dtype == qv.dtype
    seen, level = _gathered(v, qv, gather_kv_indices), lse.transpose(1, 2)
    dqv, dk, dv = dense_backward(dout, qv, v, v, out, level, seen, softmax_scale, 0.0)
    return None, None, (dk + dv).to(level_of(dk, v).dtype), dqv.to(qv.dtype), None


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
