"""FFPA (package ffpa-attn, CuTe): heads of more than 256 channels on Hopper and Blackwell GPUs.

Causal is to the bottom right corner on the GPUs that are listed for it.
From https://github.com/xlite-dev/ffpa-attn; interface of version 0.2.4.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from dtcp.kernels.softmax.plain import Window
from dtcp.kernels.softmax.types import SavedForward, SoftmaxParams

_ANY = -(2**31)  # no limit to a window; -1 is one, which causal calls refuse
_NO_WIDER_SUMS = 0  # dk and dv are stored in the model's dtype


class FFPAFunctions(NamedTuple):
    """The ops that ffpa_attn.cute registers."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    varlen_forward: Callable[..., Any]
    varlen_backward: Callable[..., Any]


class FFPA:
    """`PlainKernel` by ffpa-attn."""

    def __init__(self, functions: FFPAFunctions) -> None:
        self.functions = functions

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, window: Window, params: SoftmaxParams
    ) -> tuple[Tensor, Tensor]:
        if window.lengths is None:
            out, lse = self.functions.forward(q, k, v, params.scale, int(window.causal), 1)
            return out, lse
        out, lse = self.functions.varlen_forward(
            q,
            k,
            v,
            *window.lengths,
            params.scale,
            window.causal,
            _ANY,
            _ANY,
            0.0,
            q.shape[-2] > k.shape[-2],
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
        grad_out, out, lse = saved.grad_out.contiguous(), saved.out.contiguous(), saved.lse
        if window.lengths is None:
            dq, dk, dv = self.functions.backward(
                grad_out,
                q,
                k,
                v,
                out,
                lse,
                params.scale,
                int(window.causal),
                _NO_WIDER_SUMS,
            )
            return dq, dk, dv
        dq, dk, dv = self.functions.varlen_backward(
            q,
            k,
            v,
            out,
            grad_out,
            lse,
            *window.lengths,
            params.scale,
            window.causal,
            _ANY,
            _ANY,
            0.0,
            None,
        )
        return dq, dk, dv
