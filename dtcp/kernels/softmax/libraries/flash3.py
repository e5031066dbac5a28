"""FlashAttention 3 (module flash_attn_interface), for Hopper GPUs.

Causal is to the bottom right corner; lse is -inf for a query without keys.
From Shah et al. 2024, https://arxiv.org/abs/2407.08608; interface of the repository in 2026.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtcp.kernels.softmax.libraries.arguments import cu_seqlens, deterministic, no_limit
from dtcp.kernels.softmax.plain import Window
from dtcp.kernels.softmax.types import SavedForward, SoftmaxParams


class FlashAttention3:
    """`PlainKernel` by FlashAttention 3.

    Args:
        forward, backward: of flash_attn_interface.
    """

    def __init__(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        self.run_forward, self.run_backward = forward, backward

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, window: Window, params: SoftmaxParams
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.run_forward(
            q,
            k,
            v,
            **cu_seqlens(window),
            softmax_scale=params.scale,
            causal=window.causal,
            window_size_left=no_limit(window.left),
            window_size_right=no_limit(window.right),
            softcap=params.softcap,
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
        self.run_backward(
            saved.grad_out.contiguous(),
            q,
            k,
            v,
            saved.out.contiguous(),
            saved.lse,
            **cu_seqlens(window),
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=params.scale,
            is_causal=window.causal,
            window_size_left=no_limit(window.left),
            window_size_right=no_limit(window.right),
            softcap=params.softcap,
            deterministic=deterministic(),
        )
        return dq, dk, dv
