"""Attention of local queries over keys that are on this rank: what every strategy computes with.

All backends give the same result (`python -m dtcp.kernels` lists them): kernels of flash attention
and cuDNN where the mask is plain, Triton's for every mask, plain torch where those do not run.
"""

from collections.abc import Callable
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from dtcp.kernels.dtypes import zeros_for
from dtcp.kernels.softmax.backends import HALF, Backend
from dtcp.kernels.softmax.calls import Call, calls_of
from dtcp.kernels.softmax.choice import (
    KernelChoice,
    check_takes,
    choose_kernel,
    log_choice,
    log_rounded_parts,
    log_rounded_sums,
)
from dtcp.kernels.softmax.demand import Demand, demand_of
from dtcp.kernels.softmax.libraries.load import library_kernel
from dtcp.kernels.softmax.merge import add_sink, sink_gradient
from dtcp.kernels.softmax.pieces import without_room
from dtcp.kernels.softmax.reference import ReferenceAttention
from dtcp.kernels.softmax.score_bias import ScoreBias
from dtcp.kernels.softmax.self_test import fault_of
from dtcp.kernels.softmax.types import (
    AUTO,
    AttentionKernel,
    GradAccumulators,
    Keys,
    OneGoAttention,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
    each_interval,
)

__all__ = [
    "AttentionKernel",
    "GradAccumulators",
    "Keys",
    "OnlineSoftmax",
    "Queries",
    "SavedForward",
    "ScoreBias",
    "SoftmaxParams",
    "attend",
    "attend_backward",
    "attend_once",
    "attend_once_backward",
    "attention_kernel",
    "check_kernel",
    "kernel_choice",
    "local_sink_gradient",
    "note_merged_parts",
    "note_rounded_sums",
    "zeros_for",
]


_UNSCALED = SoftmaxParams(1.0)


def attention_kernel(
    queries: Queries, keys: Keys, params: SoftmaxParams = _UNSCALED
) -> AttentionKernel:
    """The backend that `params` names, or the fastest that does what these tensors ask for.

    Args:
        queries: that see one interval of keys.
    Raises:
        ValueError: the named backend cannot, or there is none of that name.
    """
    calls = _calls(queries, keys)
    demand = demand_of(queries, keys, calls, params)
    return _made(chosen(demand, params.kernel).backend, demand, calls)


def kernel_choice(queries: Queries, keys: Keys, params: SoftmaxParams) -> KernelChoice:
    """What `attention_kernel` takes for these, and why not another; for their first interval.

    Raises:
        ValueError: as of `attention_kernel`.
    """
    queries, keys = each_interval(queries, keys)[0]
    return chosen(demand_of(queries, keys, _calls(queries, keys), params), params.kernel)


def check_kernel(
    queries: Queries, *, kv_heads: int, value_width: int, params: SoftmaxParams
) -> None:
    """Refuse a named backend that cannot take such tensors, before ranks send each other any.

    Raises:
        ValueError: on every rank alike.
    """
    if params.kernel == AUTO:
        return
    q = queries.q
    k, v = (q.new_empty(0, 0, kv_heads, width) for width in (q.shape[-1], value_width))
    keys = Keys(k, v, queries.first_key.flatten()[:0])
    check_takes(demand_of(queries, keys, None, params), params.kernel)


@cache
def chosen(demand: Demand, name: str) -> KernelChoice:
    """The choice for a demand; said when it is first made."""
    choice = choose_kernel(demand, name, _self_test)
    log_choice(choice)
    return choice


def note_merged_parts(queries: Queries, keys: Keys, params: SoftmaxParams) -> None:
    """Say once if parts are going to be merged that their kernel has rounded."""
    _say_of_backend(log_rounded_parts, queries, keys, params)


def note_rounded_sums(queries: Queries, keys: Keys, params: SoftmaxParams) -> None:
    """Say once if ranks are going to sum gradients of keys that their kernels have rounded."""
    _say_of_backend(log_rounded_sums, queries, keys, params)


def _say_of_backend(
    say: Callable[[str], None], queries: Queries, keys: Keys, params: SoftmaxParams
) -> None:
    if queries.q.is_cuda and queries.q.dtype in HALF:
        say(kernel_choice(queries, keys, params).backend.name)


def attend(state: OnlineSoftmax, queries: Queries, keys: Keys, params: SoftmaxParams) -> None:
    """Merge the attention of `queries` over `keys` into `state`."""
    for part in each_interval(queries, keys):
        attention_kernel(*part, params).attend(state, *part, params)


def attend_backward(
    grads: GradAccumulators,
    saved: SavedForward,
    queries: Queries,
    keys: Keys,
    params: SoftmaxParams,
) -> None:
    """Add the gradients of `attend` over these keys to `grads`; dk and dv are of `keys`."""
    for part in each_interval(queries, keys):
        attention_kernel(*part, params).attend_backward(grads, saved, *part, params)


def attend_once(
    queries: Queries, keys: Keys, params: SoftmaxParams, *, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention where there are no other keys: out [B, L, H, V] in q's dtype and lse [B, L, H]."""
    if queries.are_split:
        note_merged_parts(queries, keys, params)
    elif isinstance(kernel := attention_kernel(queries, keys, params), OneGoAttention):
        out, lse = add_sink(*kernel.attend_once(queries, keys, params), sink)
        return out.to(queries.q.dtype), lse
    state = OnlineSoftmax.empty(queries.q, keys.v.shape[-1])
    attend(state, queries, keys, params)
    return state.finish(sink, queries.q.dtype)


def attend_once_backward(
    saved: SavedForward, queries: Queries, keys: Keys, params: SoftmaxParams
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of `attend_once`."""
    if not queries.are_split:
        kernel = attention_kernel(queries, keys, params)
        if isinstance(kernel, OneGoAttention):
            return kernel.attend_once_backward(saved, queries, keys, params)
    grads = GradAccumulators(zeros_for(queries.q), zeros_for(keys.k), zeros_for(keys.v))
    attend_backward(grads, saved, queries, keys, params)
    return grads.dq, grads.dk, grads.dv


def local_sink_gradient(saved: SavedForward, sink: Tensor | None) -> Tensor | None:
    """Gradient of the sinks over this rank's queries; None without sinks."""
    return None if sink is None else sink_gradient(*saved, sink)


def _calls(queries: Queries, keys: Keys) -> tuple[Call, ...] | None:
    """What the mask comes to; where only kernels for any interval run, nobody needs to know."""
    pieces = keys.pieces
    if pieces is None or not queries.q.is_cuda:
        return None
    batch, length = queries.q.shape[:2]
    sizes = (batch, length, keys.k.shape[1])
    return _read_calls(without_room(pieces).numpy().tobytes(), pieces.shape[1], *sizes)


@lru_cache(maxsize=1024)
def _read_calls(
    table: bytes, width: int, batch: int, length: int, num_keys: int
) -> tuple[Call, ...] | None:
    """All layers, and all steps over equal documents, read the same table.

    A ring reads one at each step, for each mask, and again in backward, which other micro-batches
    may come before; one that is forgotten by then takes 0.6 ms for 120 documents.
    """
    pieces = torch.frombuffer(bytearray(table), dtype=torch.int64).view(-1, width)
    return calls_of(pieces, batch=batch, length=length, num_keys=num_keys)


def _made(backend: Backend, demand: Demand, calls: tuple[Call, ...] | None) -> AttentionKernel:
    """The kernel of a backend; imports what it needs, which not every machine has."""
    if backend.name == "reference":
        return ReferenceAttention()
    if backend.name == "triton":
        from dtcp.kernels.softmax.triton.attention import TritonAttention

        return TritonAttention()
    return library_kernel(backend.name, demand, calls)


def _self_test(backend: Backend, demand: Demand) -> str | None:
    """What is wrong with a backend's results; the reference, and hosts, are what others obey."""
    if backend.name == "reference" or not demand.arch:
        return None
    return fault_of(partial(_made, backend, demand), ReferenceAttention(), demand)
