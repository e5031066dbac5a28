"""Sparse attention by FlashAttention 4's gathered keys (package flash-attn-4), on Blackwell GPUs.

There a query reads a list of rows, which are keys and values at once: its window of raw keys, and
the entries selected for it, as places in one tensor. Lists have one length, a multiple of 128, and
-1 behind what they hold. Backward rebuilds the weights from the lse that it is given, so sinks are
merged outside, as everywhere here. Gradients of rows are summed in fp32 in no fixed order.

Taken where entries are selected and heads have 512 channels, DeepSeek-V4's shape; interface of
version 4.0.0b36, lse [B, L, H] in natural logarithms.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.softmax.merge import NOTHING_SEEN, add_sink, sink_gradient
from dtcp.kernels.sparse.types import Sight, SparseGradients, SparseKeys

BLOCK = 128
"""A list of rows is a multiple of it."""
GATHERED_WIDTH = 512
MOST_HEADS = 128
TOKENS_AT_ONCE = 8192
"""Backward holds heads x rows numbers of so many queries: 1.2 GB for 64 heads and 1,152 rows."""


class GatheredFunctions(NamedTuple):
    """Of flash_attn.cute.interface."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class GatheredFlashAttention:
    """`SparseKernel` by FlashAttention 4's gathered keys."""

    def __init__(self, functions: GatheredFunctions) -> None:
        self.functions = functions

    def forward(
        self, q: Tensor, keys: SparseKeys, sink: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.functions.forward(
            None,
            None,
            _rows(keys),
            qv=q,
            softmax_scale=scale,
            gather_kv_indices=gathered_places(keys),
            gather_bwd_recompute_p=True,
            return_lse=True,
        )
        out, lse = add_sink(out, lse, sink)
        return out.to(q.dtype), lse

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        keys: SparseKeys,
        sink: Tensor | None,
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> SparseGradients:
        rows, places = _rows(keys), gathered_places(keys)
        # A query that reads nothing has lse -inf; with any finite value its weights are 0.
        level = lse.masked_fill(lse == NOTHING_SEEN, 0.0)
        dq, parts = torch.empty_like(q, memory_format=torch.contiguous_format), []
        # Row by row: only then does backward take the tokens in pieces.
        for row in range(q.shape[0]):
            own = slice(row, row + 1)
            *_, drows, dq_row, _ = self.functions.backward(
                None,
                None,
                rows[own],
                q[own],
                out[own].contiguous(),
                grad_out[own].to(q.dtype).contiguous(),
                level[own].contiguous(),
                None,
                None,
                places[own],
                softmax_scale=scale,
                recompute_p=True,
                token_chunk=TOKENS_AT_ONCE,
            )
            dq[own] = dq_row
            parts.append(drows[:, :, 0])
        dkeys, dentries = torch.cat(parts).split((keys.keys.shape[1], _entries(keys).shape[1]), 1)
        dsink = None if sink is None else sink_gradient(grad_out, out, lse, sink)
        return SparseGradients(dq, dkeys, dentries, dsink)


def gathered_places(keys: SparseKeys) -> Tensor:
    """The rows of `_rows` that each query reads: [B, L, N] int32, -1 for none.

    N is found on the host, from the tiles, so nothing waits for the device.
    """
    assert keys.selected is not None
    sight, selected = keys.sight, keys.selected
    widest, number = _widest_window(sight), keys.keys.shape[1]
    start, stop = sight.key_run[..., :1], sight.key_run[..., 1:]
    window = start + torch.arange(widest, dtype=torch.int32, device=start.device)
    window = window.where(window < stop, -1)
    entries = (selected + number).where(selected >= 0, -1)
    places = torch.cat((window, entries), dim=-1)
    return torch.nn.functional.pad(places, (0, -places.shape[-1] % BLOCK), value=-1)


def _widest_window(sight: Sight) -> int:
    """The most keys that a query may read, and less than a tile's queries more."""
    tiles = sight.tiles.flatten(0, 1)
    return max(1, int((tiles[:, 3] - tiles[:, 2]).max())) if len(tiles) else 1


def _entries(keys: SparseKeys) -> Tensor:
    assert keys.entries is not None
    return keys.entries


def _rows(keys: SparseKeys) -> Tensor:
    """Raw keys, then entries, with their one head: [B, K + P, 1, D]."""
    return torch.cat((keys.keys, _entries(keys)), dim=1)[:, :, None]
