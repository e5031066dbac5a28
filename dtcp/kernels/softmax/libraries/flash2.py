"""FlashAttention 2 (package flash-attn), for Ampere GPUs and whatever else it was built for.

Causal is to the bottom right corner. lse is inf for a query without keys.
From Dao 2023, https://arxiv.org/abs/2307.08691; interface of version 2.8.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.softmax.libraries.arguments import cu_seqlens, deterministic, no_limit
from dtcp.kernels.softmax.merge import NOTHING_SEEN
from dtcp.kernels.softmax.plain import Window
from dtcp.kernels.softmax.types import SavedForward, SoftmaxParams


class Flash2Functions(NamedTuple):
    """Of flash_attn.flash_attn_interface, in this order."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    varlen_forward: Callable[..., Any]
    varlen_backward: Callable[..., Any]


class FlashAttention2:
    """`PlainKernel` by FlashAttention 2."""

    def __init__(self, functions: Flash2Functions) -> None:
        self.functions = functions

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, window: Window, params: SoftmaxParams
    ) -> tuple[Tensor, Tensor]:
        call = self.functions.varlen_forward if window.lengths else self.functions.forward
        out, lse, *_ = call(
            q,
            k,
            v,
            **cu_seqlens(window),
            dropout_p=0.0,
            softmax_scale=params.scale,
            causal=window.causal,
            window_size_left=no_limit(window.left),
            window_size_right=no_limit(window.right),
            softcap=params.softcap,
            alibi_slopes=None,
            return_softmax=False,
        )
        return out, lse.masked_fill(lse == float("inf"), NOTHING_SEEN)

    def backward(
        self,
        saved: SavedForward,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: Window,
        params: SoftmaxParams,
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = self.functions.varlen_backward if window.lengths else self.functions.backward
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        call(
            saved.grad_out.contiguous(),
            q,
            k,
            v,
            saved.out.contiguous(),
            saved.lse,
            dq,
            dk,
            dv,
            **cu_seqlens(window),
            dropout_p=0.0,
            softmax_scale=params.scale,
            causal=window.causal,
            window_size_left=no_limit(window.left),
            window_size_right=no_limit(window.right),
            softcap=params.softcap,
            alibi_slopes=None,
            deterministic=deterministic(),
            rng_state=None,
        )
        return dq, dk, dv
