"""Attention by kernels of others: calls cut out of a mask, results merged and gradients summed.

Such a kernel takes a rectangle, a diagonal or a window, for one sequence or for several packed
ones, and returns what it computed in the model's dtype. In one attention every query is in one
call at most, so results of its calls are put side by side; only what other attentions, over other
keys, found before is merged. Backward is given out and lse over all keys, as everywhere here.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation, zeros_for
from dtcp.kernels.softmax.calls import Call, Lengths
from dtcp.kernels.softmax.merge import NOTHING_SEEN, merge_into
from dtcp.kernels.softmax.types import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
)


class Window(NamedTuple):
    """What a kernel reads of a call's mask."""

    left: int | None  # keys a query sees beside its diagonal; None for all
    right: int | None
    lengths: Lengths | None  # of packed sequences

    @property
    def causal(self) -> bool:
        return self.left is None and self.right == 0


class PlainKernel(Protocol):
    """Attention under a window, in layouts of the flash family.

    q [B, L, H, D], k [B, K, G, D], v [B, K, G, V], out like q with V channels, lse [B, H, L] in
    natural logarithms; packed, the same without B and with all sequences along L or K. A query
    without keys gets out 0 and lse -inf.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, window: Window, params: SoftmaxParams
    ) -> tuple[Tensor, Tensor]:
        """out and lse."""

    def backward(
        self,
        saved: SavedForward,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: Window,
        params: SoftmaxParams,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv over these keys; out and lse are over all keys, lse finite."""


class PlainAttention:
    """`AttentionKernel` that makes the calls of a mask with a plain kernel.

    Args:
        calls: what the mask comes to for these queries and keys.
    """

    def __init__(self, kernel: PlainKernel, calls: Sequence[Call]) -> None:
        self.kernel, self.calls = kernel, calls

    def attend(
        self, state: OnlineSoftmax, queries: Queries, keys: Keys, params: SoftmaxParams
    ) -> None:
        for call in self.calls:
            out, lse = self._forward(call, queries, keys, params)
            whole_out, whole_lse = (_rows(x, call)[:, call.queries] for x in state)
            merge_into(whole_out, whole_lse, out.to(whole_out.dtype), lse)

    def attend_backward(
        self,
        grads: GradAccumulators,
        saved: SavedForward,
        queries: Queries,
        keys: Keys,
        params: SoftmaxParams,
    ) -> None:
        for call, parts in self._backward(saved, queries, keys, params):
            for whole, part, cut in zip(
                grads, parts, (call.queries, call.keys, call.keys), strict=True
            ):
                _rows(whole, call)[:, cut] += part

    def attend_once(
        self, queries: Queries, keys: Keys, params: SoftmaxParams
    ) -> tuple[Tensor, Tensor]:
        """out [B, L, H, V] in q's dtype and lse [B, L, H] over these keys and no others."""
        q, v = queries.q, keys.v
        if len(self.calls) == 1 and self.calls[0].every_row and _whole(self.calls[0], queries):
            return self._forward(self.calls[0], queries, keys, params)
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        lse = q.new_full(q.shape[:-1], NOTHING_SEEN, dtype=accumulation(q.dtype))
        for call in self.calls:
            part_out, part_lse = self._forward(call, queries, keys, params)
            whole_out, whole_lse = (_rows(x, call)[:, call.queries] for x in (out, lse))
            if call.packed:
                # Queries between the sequences are another call's.
                seen = part_lse != NOTHING_SEEN
                part_out = torch.where(seen[..., None], part_out, whole_out)
                part_lse = torch.where(seen, part_lse, whole_lse)
            whole_out.copy_(part_out)
            whole_lse.copy_(part_lse)
        return out, lse

    def attend_once_backward(
        self, saved: SavedForward, queries: Queries, keys: Keys, params: SoftmaxParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv where there are no other keys; in q's dtype if that loses nothing."""
        if len(self.calls) == 1 and self.calls[0].every_row:
            (call,) = self.calls
            parts = next(self._backward(saved, queries, keys, params))[1]
            if _whole(call, queries) and call.keys == slice(0, keys.k.shape[1]):
                return parts
        sums = GradAccumulators(zeros_for(queries.q), zeros_for(keys.k), zeros_for(keys.v))
        self.attend_backward(sums, saved, queries, keys, params)
        return sums.dq, sums.dk, sums.dv

    def _forward(
        self, call: Call, queries: Queries, keys: Keys, params: SoftmaxParams
    ) -> tuple[Tensor, Tensor]:
        """out [B, l, H, V] and lse [B, l, H] of the call's queries, of which B is 1 if flat."""
        q, k, v = _operands(call, queries, keys)
        window = _window(call, q.device)
        if window.lengths is None:
            out, lse = self.kernel.forward(q, k, v, window, params)
        else:
            out, lse = self.kernel.forward(q[0], k[0], v[0], window, params)
            out, lse = out[None], lse[None]
        return out, lse.transpose(1, 2)

    def _backward(
        self, saved: SavedForward, queries: Queries, keys: Keys, params: SoftmaxParams
    ) -> Iterator[tuple[Call, tuple[Tensor, Tensor, Tensor]]]:
        # A query that sees nothing has lse -inf; with any finite value its keys have weight 0.
        lse = saved.lse.masked_fill(saved.lse == NOTHING_SEEN, 0.0)
        saved = SavedForward(saved.grad_out.to(queries.q.dtype), saved.out, lse)
        for call in self.calls:
            q, k, v = _operands(call, queries, keys)
            grad_out, out, level = (_rows(x, call)[:, call.queries] for x in saved)
            own = SavedForward(grad_out, out, level.transpose(1, 2).contiguous())
            window = _window(call, q.device)
            if window.lengths is None:
                yield call, self.kernel.backward(own, q, k, v, window, params)
            else:
                packed = SavedForward(*(x[0] for x in own))
                dq, dk, dv = self.kernel.backward(packed, q[0], k[0], v[0], window, params)
                yield call, (dq[None], dk[None], dv[None])


def _window(call: Call, device: torch.device) -> Window:
    return Window(call.left, call.right, call.lengths(device) if call.packed else None)


def _rows(x: Tensor, call: Call) -> Tensor:
    """x [B, L, ..] as the call counts its tokens: row by row, or all rows end to end, [1, B L, ..].

    A view where x is written to: those are contiguous, or channels of something that is.
    """
    return x if call.every_row or x.shape[0] == 1 else x.flatten(0, 1)[None]


def _operands(call: Call, queries: Queries, keys: Keys) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_rows(aligned(x), call) for x in (queries.q, keys.k, keys.v))
    return q[:, call.queries], k[:, call.keys], v[:, call.keys]


ALIGNMENT = 16
"""Bytes that kernels load at a time, and so what the place of every head is a multiple of."""


def aligned(x: Tensor) -> Tensor:
    """x [B, L, H, D] with each head where kernels load it; a copy where that is elsewhere.

    As beside a gate in a row of one projection: few kernels look, and for others the GPU stops the
    process ("misaligned address").
    """
    places = (x.data_ptr(), *(step * x.element_size() for step in x.stride()[:-1]))
    if all(place % ALIGNMENT == 0 for place in places):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _whole(call: Call, queries: Queries) -> bool:
    return call.queries == slice(0, queries.q.shape[1])
