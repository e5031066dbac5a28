"""What calls of flash attention share: how they take windows and lengths."""

from typing import Any

import torch

from dtcp.kernels.softmax.plain import Window


def no_limit(bound: int | None) -> int:
    """A bound of a window as FlashAttention 2 and 3 take it."""
    return -1 if bound is None else bound


def deterministic() -> bool:
    """Whether torch was asked for the same bits every time."""
    return torch.are_deterministic_algorithms_enabled()


def cu_seqlens(window: Window) -> dict[str, Any]:
    """The lengths of packed sequences by the names that all flash kernels have for them."""
    if window.lengths is None:
        return {}
    q, k, longest_q, longest_k = window.lengths
    return {
        "cu_seqlens_q": q,
        "cu_seqlens_k": k,
        "max_seqlen_q": longest_q,
        "max_seqlen_k": longest_k,
    }
