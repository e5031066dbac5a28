"""Which kernel scores for an indexer: Triton's where it runs, which the log says where it does not.

On a GPU it is first compared with plain torch.
"""

import logging
from collections.abc import Callable
from functools import cache
from math import inf

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.faults import excess, fault_in, largest_error
from dtcp.kernels.triton_support import triton_runs_on

LOG = logging.getLogger("dtcp.kernels")
MOST_INDEX_HEADS, WIDEST_INDEX_HEAD = 64, 128
"""What all models that are published have at most; a block of keys and one query's heads then take
up to 48 KiB."""

IndexScores = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q [Q, H, D], weight [Q, H], keys [P, D], first [Q], last [Q], closing [P]) -> [Q, P] fp32."""


def index_kernel(q: Tensor, keys: Tensor) -> IndexScores | None:
    """Triton's kernel for queries [..., H, D] and keys [..., D]; None where torch has to score."""
    reason, (heads, dim) = refusal_of_index(q, keys), q.shape[-2:]
    if q.is_cuda:
        reason = reason or _fault(q.dtype, q.device, heads, dim)
        if reason is not None:
            _say_plain_torch(q.dtype, heads, dim, reason)
    return triton_scores() if reason is None else None


def refusal_of_index(q: Tensor, keys: Tensor) -> str | None:
    """What of these tensors the kernel does not do."""
    reason, (heads, dim) = None, q.shape[-2:]
    if not triton_runs_on(q):
        reason = "runs on GPUs from Ampere on, in fp32, fp16 and bf16"
    elif keys.dtype != q.dtype:
        reason = f"takes q and keys of one dtype, not {q.dtype} and {keys.dtype}"
    elif heads > MOST_INDEX_HEADS or dim > WIDEST_INDEX_HEAD:
        reason = f"takes at most {MOST_INDEX_HEADS} heads of at most {WIDEST_INDEX_HEAD} channels"
    return reason


@cache
def triton_scores() -> IndexScores:
    """Our own kernel; imports Triton, which not every machine has."""
    from dtcp.kernels.sparse.triton.index_scores import index_scores

    return index_scores


def plain_scores(
    q: Tensor, weight: Tensor, keys: Tensor, first: Tensor, last: Tensor, closing: Tensor
) -> Tensor:
    """`IndexScores` in plain torch, in the dtype of accumulation."""
    wide = accumulation(q.dtype)
    products = (q.flatten(0, 1).to(wide) @ keys.to(wide).mT).relu_()
    score = torch.einsum("qhp,qh->qp", products.unflatten(0, q.shape[:2]), weight.to(wide))
    return score.masked_fill(~visible(first, last, closing), -inf)


def visible(first: Tensor, last: Tensor, token_index: Tensor) -> Tensor:
    """Whether each query sees a token, or the entry that closes with it: [Q, P] bool.

    Args:
        first, last: [Q], the interval of token indices that a query sees.
        token_index: [P].
    """
    return (token_index >= first[:, None]) & (token_index <= last[:, None])


def fault_of_index(
    make_kernel: Callable[[], IndexScores],
    dtype: torch.dtype,
    device: torch.device,
    heads: int,
    dim: int,
) -> str | None:
    """What is wrong with a kernel's scores, in a few words; None if they are right."""

    def check() -> str | None:
        draw = torch.Generator(device).manual_seed(0)
        q, weight, keys = (
            torch.randn(shape, generator=draw, device=device).to(dtype)
            for shape in ((40, heads, dim), (40, heads), (300, dim))
        )
        last, closing = (torch.arange(n, dtype=torch.int32, device=device) for n in (40, 300))
        # Some queries see the last keys, which do not fill a block; and no query sees all blocks.
        first, last = (last - 9).clamp(min=0) * 4, 8 * last
        given = (q, weight, keys, first, last, closing)
        ours, right = make_kernel()(*given), plain_scores(*given)
        blind = right == -inf
        ours = ours.masked_fill(blind & (ours == -inf), 0.0)
        return excess("scores", {"scores": largest_error(ours, right.masked_fill(blind, 0.0))})

    return fault_in(check, device)


@cache
def _fault(dtype: torch.dtype, device: torch.device, heads: int, dim: int) -> str | None:
    """What is wrong with its scores on this device, found at its first use."""
    return fault_of_index(triton_scores, dtype, device, heads, dim)


@cache
def _say_plain_torch(dtype: torch.dtype, heads: int, dim: int, reason: str) -> None:
    LOG.warning(
        "an indexer's scores (%d heads of %d, %s) are computed by plain torch, many times slower: "
        "triton %s",
        heads,
        dim,
        str(dtype).removeprefix("torch."),
        reason,
    )
