"""FlashAttention 4 (package flash-attn-4, CuTe), for Hopper and Blackwell GPUs.

Plain windows by its flags, packed documents by its cu_seqlens, and every other mask by a mask
function over our tables, with the blocks that some query and that every query sees. It compiles
each configuration at its first use, for seconds.

Causal is to the bottom right corner; lse is -inf for a query without keys.
From Zadouri et al. 2026, https://arxiv.org/abs/2603.05451; interface of version 4.0.0b36.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.softmax.libraries.arguments import cu_seqlens, deterministic
from dtcp.kernels.softmax.merge import NOTHING_SEEN, merge_into
from dtcp.kernels.softmax.plain import Window, aligned
from dtcp.kernels.softmax.sparsity import BlockLists, key_blocks, query_blocks
from dtcp.kernels.softmax.types import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
)


class Flash4Functions(NamedTuple):
    """What is used of flash_attn.cute, and the mask function that reads our tables."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    block_sparse_tensors: Callable[..., Any]
    interval_mask: Callable[..., Any]


class FlashAttention4:
    """`PlainKernel` by FlashAttention 4."""

    def __init__(self, functions: Flash4Functions) -> None:
        self.functions = functions

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, window: Window, params: SoftmaxParams
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.functions.forward(
            q,
            k,
            v,
            **cu_seqlens(window),
            softmax_scale=params.scale,
            causal=window.causal,
            softcap=params.softcap or None,
            window_size_left=window.left,
            window_size_right=None if window.causal else window.right,
            return_lse=True,
        )
        return out, lse

    def backward(
        self,
        saved: SavedForward,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: Window,
        params: SoftmaxParams,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        self.functions.backward(
            q,
            k,
            v,
            saved.out.contiguous(),
            saved.grad_out.contiguous(),
            saved.lse,
            **cu_seqlens(window),
            softmax_scale=params.scale,
            causal=window.causal,
            softcap=params.softcap,
            window_size_left=window.left,
            window_size_right=None if window.causal else window.right,
            deterministic=deterministic(),
            dq=dq,
            dk=dk,
            dv=dv,
        )
        return dq, dk, dv


class BlockSize(NamedTuple):
    """Queries and keys of a block that the kernels of a GPU skip or leave unmasked as a whole."""

    queries: int
    keys: int


def block_size(width: int, arch: int) -> BlockSize:
    """The blocks that forward and backward of these heads both take.

    Args:
        width: of the wider of key and value.
        arch: compute capability, 90 or 100.
    """
    if arch >= 100:
        return BlockSize(256, 128)
    return BlockSize(128, 128 if width <= 128 else 96 if width <= 192 else 64)


class FlashIntervalAttention:
    """`AttentionKernel` by FlashAttention 4 for masks that are no plain window.

    The lists of blocks are made on the device, out of the same tables, and nothing waits for them.

    Args:
        blocks: of `block_size`.
    """

    def __init__(self, functions: Flash4Functions, blocks: BlockSize) -> None:
        self.functions, self.blocks = functions, blocks

    def attend(
        self, state: OnlineSoftmax, queries: Queries, keys: Keys, params: SoftmaxParams
    ) -> None:
        out, lse = self.attend_once(queries, keys, params)
        merge_into(state.out, state.lse, out.to(state.out.dtype), lse)

    def attend_backward(
        self,
        grads: GradAccumulators,
        saved: SavedForward,
        queries: Queries,
        keys: Keys,
        params: SoftmaxParams,
    ) -> None:
        parts = self.attend_once_backward(saved, queries, keys, params)
        for whole, part in zip(grads, parts, strict=True):
            whole += part

    def attend_once(
        self, queries: Queries, keys: Keys, params: SoftmaxParams
    ) -> tuple[Tensor, Tensor]:
        """out [B, L, H, V] in q's dtype and lse [B, L, H] over these keys and no others."""
        out, lse, *_ = self.functions.forward(
            *(aligned(x) for x in (queries.q, keys.k, keys.v)),
            softmax_scale=params.scale,
            softcap=params.softcap or None,
            mask_mod=self.functions.interval_mask,
            aux_tensors=_mask_tensors(queries, keys),
            block_sparse_tensors=self._sparse(query_blocks(queries, keys, *self.blocks)),
            return_lse=True,
        )
        return out, lse.transpose(1, 2)

    def attend_once_backward(
        self, saved: SavedForward, queries: Queries, keys: Keys, params: SoftmaxParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv over these keys."""
        lse = saved.lse.masked_fill(saved.lse == NOTHING_SEEN, 0.0)
        like = [aligned(x) for x in (queries.q, keys.k, keys.v)]
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in like)
        self.functions.backward(
            *like,
            saved.out.contiguous(),
            saved.grad_out.to(queries.q.dtype).contiguous(),
            lse.transpose(1, 2).contiguous(),
            softmax_scale=params.scale,
            softcap=params.softcap,
            mask_mod=self.functions.interval_mask,
            aux_tensors=_mask_tensors(queries, keys),
            block_sparse_tensors=self._sparse(key_blocks(queries, keys, *self.blocks)),
            dq=dq,
            dk=dk,
            dv=dv,
        )
        return dq, dk, dv

    def _sparse(self, lists: BlockLists) -> Any:
        """Counts and indices of one list for all heads: [B, 1, ..]."""
        partial, partial_index, full, full_index = (x.unsqueeze(1) for x in lists)
        return self.functions.block_sparse_tensors(
            mask_block_cnt=partial,
            mask_block_idx=partial_index,
            full_block_cnt=full,
            full_block_idx=full_index,
            block_size=tuple(self.blocks),
        )


def _mask_tensors(queries: Queries, keys: Keys) -> list[Tensor]:
    """What the mask function reads, a row of intervals for every row of queries."""
    rows = queries.q.shape[0]
    first, last = (x.expand(rows, -1).contiguous() for x in (queries.first_key, queries.last_key))
    return [first, last, keys.token_index.contiguous()]
