"""cuDNN's attention inside torch: nothing to install. For Hopper and Blackwell GPUs above all.

Causal is to the top left corner, so it serves as many queries as keys.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtcp.kernels.softmax.plain import Window
from dtcp.kernels.softmax.types import SavedForward, SoftmaxParams


class CudnnAttention:
    """`PlainKernel` by aten's _scaled_dot_product_cudnn_attention and its backward.

    Args:
        forward, backward: those ops.
    """

    def __init__(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        self.run_forward, self.run_backward = forward, backward

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, window: Window, params: SoftmaxParams
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.run_forward(
            *(x.transpose(1, 2) for x in (q, k, v)),
            None,
            True,
            0.0,
            window.causal,
            False,
            scale=params.scale,
        )
        # [B, H, L, 1] in torch 2.11 to 2.13.
        return out.transpose(1, 2), lse.reshape(out.shape[:3])

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
        unused = torch.zeros(1, dtype=torch.int64, device=q.device)
        heads_first = (x.transpose(1, 2) for x in (saved.grad_out, q, k, v, saved.out))
        grads = self.run_backward(
            *heads_first,
            saved.lse[..., None],
            unused,
            unused,
            None,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            window.causal,
            scale=params.scale,
        )
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv
