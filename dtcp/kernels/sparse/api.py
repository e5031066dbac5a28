"""Attention to a window of keys and to compressed entries: what the op of the mixer calls.

Three backends give the same result: FlashAttention 4's gathered keys on Blackwell GPUs, Triton's
kernels on others, plain torch where those do not run. On a GPU a kernel is first compared with
plain torch. The log says once which it is, and why not a faster one.
"""

import logging
from functools import cache

import torch
from torch import Tensor

from dtcp.kernels.softmax.backends import HALF, backend_named
from dtcp.kernels.softmax.demand import missing
from dtcp.kernels.softmax.libraries.load import functions_of
from dtcp.kernels.sparse.blocks import Columns, sparse_fit, widest_columns
from dtcp.kernels.sparse.flash4 import (
    GATHERED_WIDTH,
    MOST_HEADS,
    GatheredFlashAttention,
    GatheredFunctions,
)
from dtcp.kernels.sparse.reference import ReferenceSparseAttention
from dtcp.kernels.sparse.self_test import SparseReads, fault_of_sparse
from dtcp.kernels.sparse.types import Sight, SparseGradients, SparseKernel, SparseKeys
from dtcp.kernels.triton_support import capability_major, shared_memory, triton_runs_on

__all__ = [
    "Sight",
    "SparseGradients",
    "SparseKernel",
    "SparseKeys",
    "sparse_kernel",
]

LOG = logging.getLogger("dtcp.kernels")


def sparse_kernel(q: Tensor, keys: SparseKeys, sink: Tensor | None = None) -> SparseKernel:
    """Triton's kernels where they run and take these dtypes and widths, else plain torch.

    Triton's gradients of selected entries are summed in no fixed order. Where torch is asked for
    deterministic algorithms, plain torch computes them instead.
    """
    if _gathered_refusal(q, keys) is None:
        return _gathered_kernel()
    reason = refusal_of_triton(q, keys)
    if q.is_cuda:
        widths = (q.shape[-1], keys.value_dim)
        asked = (q.dtype, q.device, *widths, q.shape[2], SparseReads.of(keys))
        reason = reason or _triton_fault(*asked, sink is not None)
        if reason is not None:
            _say_plain_torch(q.dtype, q.shape[-1], reason)
    return triton_kernel() if reason is None else ReferenceSparseAttention()


def refusal_of_triton(q: Tensor, keys: SparseKeys) -> str | None:
    """What of these tensors our own kernels do not do."""
    dtypes = {x.dtype for x in (q, keys.keys, keys.entries) if x is not None}
    reason = None
    if not triton_runs_on(q):
        reason = "runs on GPUs from Ampere on, in fp32, fp16 and bf16"
    elif len(dtypes) > 1:
        reason = f"takes q, keys and entries of one dtype, not of {len(dtypes)}"
    elif sparse_fit(q, keys.value_dim) is None:
        columns = Columns.of(q.shape[-1], keys.value_dim)
        widest = widest_columns(q.dtype, capability_major(q), shared_memory(q))
        reason = (
            f"takes at most {widest} channels in this dtype on this GPU, those of values and those "
            f"behind them rounded up to powers of two, here {columns.values} + {columns.others}"
        )
    elif keys.selected is not None and torch.are_deterministic_algorithms_enabled():
        reason = "does not repeat itself bit by bit, which torch was asked for"
    return reason


def _gathered_refusal(q: Tensor, keys: SparseKeys) -> str | None:
    """Why FlashAttention 4's gathered keys do not serve these; None if they do."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] not in (10, 11):
        return "runs on Blackwell GPUs"
    reason = refusal_of_gathered(q, keys) or missing(backend_named("flash").package)
    reason = reason or _fault(q.dtype, q.device, q.shape[2])
    _say_refusal(reason)
    return reason


def refusal_of_gathered(q: Tensor, keys: SparseKeys) -> str | None:
    """What of these tensors gathered keys do not do."""
    reason = None
    if {q.shape[-1], keys.value_dim} != {GATHERED_WIDTH} or q.shape[2] > MOST_HEADS:
        reason = f"takes heads of {GATHERED_WIDTH}, all of them values, at most {MOST_HEADS}"
    elif keys.selected is None or keys.entries is None:
        reason = "takes selected entries only"
    elif q.dtype not in HALF or not q.dtype == keys.keys.dtype == keys.entries.dtype:
        reason = "takes bfloat16 or float16"
    elif torch.are_deterministic_algorithms_enabled():
        reason = "does not repeat itself bit by bit, which torch was asked for"
    return reason


@cache
def triton_kernel() -> SparseKernel:
    """Our own kernels; imports Triton, which not every machine has."""
    from dtcp.kernels.sparse.triton.attention import TritonSparseAttention

    return TritonSparseAttention()


@cache
def _triton_fault(
    dtype: torch.dtype,
    device: torch.device,
    width: int,
    value_dim: int,
    heads: int,
    reads: SparseReads,
    has_sink: bool,
) -> str | None:
    """What is wrong with their results on this device, found at their first use."""
    return fault_of_sparse(
        triton_kernel,
        ReferenceSparseAttention(),
        dtype,
        device,
        width,
        value_dim=value_dim,
        heads=heads,
        reads=reads,
        has_sink=has_sink,
    )


@cache
def _say_plain_torch(dtype: torch.dtype, width: int, reason: str) -> None:
    LOG.warning(
        "sparse attention (heads of %d, %s) is computed by plain torch, many times slower: "
        "triton %s",
        width,
        str(dtype).removeprefix("torch."),
        reason,
    )


@cache
def _gathered_kernel() -> SparseKernel:
    """FlashAttention 4's kernel; imports what not every machine has."""
    names = ("_flash_attn_fwd", "_flash_attn_bwd_sparse_mla")
    return GatheredFlashAttention(
        GatheredFunctions(*functions_of("flash_attn.cute.interface", *names))
    )


@cache
def _fault(dtype: torch.dtype, device: torch.device, heads: int) -> str | None:
    """What is wrong with its results on this device, found at its first use.

    Up to 64 heads its backward is another kernel than beyond.
    """
    asked = (ReferenceSparseAttention(), dtype, device, GATHERED_WIDTH)
    return fault_of_sparse(_gathered_kernel, *asked, heads=heads)


@cache
def _say_refusal(reason: str | None) -> None:
    if reason is None:
        LOG.info("sparse attention is computed by flash, over gathered keys")
    else:
        LOG.warning("sparse attention is not computed by flash, the fastest: it %s", reason)
