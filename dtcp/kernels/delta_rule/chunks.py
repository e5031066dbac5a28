"""Stretches of tokens cut into chunks: [R, T, H, D] to [R, H, N, C, D], and back."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dtcp.kernels.dtypes import accumulation

CHUNK_LEN = 64
"""Tokens per chunk: the state is carried from chunk to chunk, inside a chunk all is matmuls."""


def chunk_length(length: int, *, most: int = CHUNK_LEN) -> int:
    """Tokens per chunk of a stretch; a power of two, as decays by channel need."""
    return min(most, 1 << (length - 1).bit_length())


def per_head(x: Tensor, heads: int) -> Tensor:
    """Value head h reads key head h // (H / G)."""
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def summed_per_head(x: Tensor, key_heads: int) -> Tensor:
    """Gradients [R, T, H, K] of the keys that value heads read, to those of the key heads."""
    return x.unflatten(2, (key_heads, -1)).sum(3)


def by_channel(g: Tensor) -> Tensor:
    """[R, T, H] or [R, T, H, K] -> [R, T, H, 1 or K]."""
    return g if g.ndim == 4 else g[..., None]


def in_chunks(x: Tensor, chunk: int) -> Tensor:
    """[R, T, H, D] -> [R, H, N, C, D], the last chunk padded with zeros."""
    if x.is_floating_point():
        x = x.to(accumulation(x.dtype))
    missing = -x.shape[1] % chunk
    return F.pad(x.transpose(1, 2), (0, 0, 0, missing)).unflatten(2, (-1, chunk)).contiguous()


def in_tokens(x: Tensor, length: int) -> Tensor:
    """[R, H, N, C, D] -> [R, T, H, D]."""
    return x.flatten(2, 3)[:, :, :length].transpose(1, 2)


def decay_gradient(d_sum: Tensor, g: Tensor, starts: Tensor) -> Tensor:
    """The gradient of log-decays g, [R, T, H] or [R, T, H, K], from that of their running sums.

    Args:
        d_sum: [R, H, N, C, K], of the sums from a chunk's start to each of its tokens.
        starts: [R, T], not 0 where a document starts: no decay reaches across.
    """
    d_sum = d_sum if g.ndim == 4 else d_sum.sum(-1, keepdim=True)
    d_g = in_tokens(running_sum(d_sum.flip(-2)).flip(-2), g.shape[1]).reshape(g.shape)
    return d_g.masked_fill(starts.view(*starts.shape, *(1,) * (g.ndim - 2)) != 0, 0)


def running_sum(x: Tensor) -> Tensor:
    """Along the tokens of chunks, [.., C, K], as cumsum(-2) does.

    On a GPU that refuses floats where torch is asked for algorithms that repeat themselves; in
    steps of doubling length nothing is left to the order in which threads come.
    """
    if not (x.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return x.cumsum(-2)
    step = 1
    while step < x.shape[-2]:
        x = x + F.pad(x[..., :-step, :], (0, 0, step, 0))
        step *= 2
    return x
