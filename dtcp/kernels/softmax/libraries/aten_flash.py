"""FlashAttention 2 inside torch: nothing to install. For Ampere GPUs and newer.

Causal is to the bottom right corner. lse is inf for a query without keys.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtcp.kernels.softmax.merge import NOTHING_SEEN
from dtcp.kernels.softmax.plain import Window
from dtcp.kernels.softmax.types import SavedForward, SoftmaxParams


class AtenFlash:
    """`PlainKernel` by aten's _flash_attention_forward and _flash_attention_backward.

    Args:
        forward, backward: those ops.
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
            *_lengths(window, q, k),
            0.0,
            window.causal,
            False,
            scale=params.scale,
            window_size_left=window.left,
            window_size_right=None if window.causal else window.right,
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
        # Without dropout nothing is drawn, and the state of the generator is not read.
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = self.run_backward(
            saved.grad_out.contiguous(),
            q,
            k,
            v,
            saved.out.contiguous(),
            saved.lse,
            *_lengths(window, q, k),
            0.0,
            window.causal,
            unused,
            unused[:0],
            scale=params.scale,
            window_size_left=window.left,
            window_size_right=None if window.causal else window.right,
        )
        return dq, dk, dv


def _lengths(window: Window, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None, int, int]:
    """cum_seq_q, cum_seq_k, max_q and max_k; without packing, none and the lengths of the rows."""
    if window.lengths is None:
        return None, None, q.shape[1], k.shape[1]
    return window.lengths
