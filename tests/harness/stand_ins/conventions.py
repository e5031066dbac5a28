"""What libraries of attention share: windows, packed sequences, dtypes, and the maths in fp64."""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.harness.dense_attention import dense_backward, dense_forward, seen_under


def check_only_defaults(
    function: Callable[..., Any], given: dict[str, Any], used: set[str]
) -> None:
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in used:
            assert given[name] is parameter.default or given[name] == parameter.default, name


def check_loaded(*tensors: Tensor) -> None:
    """Kernels load 16 bytes at a time, and a GPU stops a process that loads them from elsewhere."""
    for x in tensors:
        assert x.stride(-1) == 1
        places = (x.data_ptr(), *(step * x.element_size() for step in x.stride()[:-1]))
        assert not any(place % 16 for place in places), x.stride()


def bound_of(size: int) -> int | None:
    return None if size < 0 else size


def window_of(causal: bool, left: int | None, right: int | None) -> tuple[int | None, int | None]:
    return left, 0 if causal else right


def lengths_of(
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


def level_of(lse: Tensor, like: Tensor) -> Tensor:
    """lse in fp32, or in fp64 where a test computes in that."""
    return lse if like.dtype == torch.float64 else lse.float()


def blind_inf(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def attend(
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
    check_loaded(q, k, v)
    if lengths is None:
        seen = seen_under(q.shape[1], k.shape[1], *window) if mask is None else mask
        out, lse = dense_forward(q, k, v, seen, scale, softcap)
        return out.to(q.dtype), level_of(lse, q)
    out = torch.full((*q.shape[:-1], v.shape[-1]), torch.nan, dtype=torch.float64)
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan, dtype=torch.float64)
    for of_q, of_k in lengths:
        seen = seen_under(of_q.stop - of_q.start, of_k.stop - of_k.start, *window)
        one = dense_forward(q[None, of_q], k[None, of_k], v[None, of_k], seen, scale, softcap)
        out[of_q], lse[:, of_q] = one[0][0], one[1][0]
    return out.to(q.dtype), level_of(lse, q)


def attend_backward(
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
    check_loaded(grad_out, q, k, v, out)
    assert q.dtype == k.dtype == v.dtype == out.dtype == grad_out.dtype
    assert lse.isfinite().all() and lse.dtype == level_of(lse.double(), q).dtype
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
