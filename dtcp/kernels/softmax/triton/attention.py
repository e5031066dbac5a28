"""Attention by Triton's kernels: one launch for all tiles, heads and rows.

Every mask here is one interval of token indices per query, so one kernel serves causal attention,
windows, packed documents, prefixes, vision blocks and padding, in any layout. Forward merges into
the online softmax in place, and backward adds to the sums in place without atomics: the same bits
every time.

The host's block ranges are not read, and nothing waits for the host: which keys a tile sees is
found on the device (ranges.py). This module imports Triton, so api.py imports it only where it is
used.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dtcp.kernels.softmax.score_bias import ScoreBias
from dtcp.kernels.softmax.triton.backward import key_gradient_kernel, query_gradient_kernel
from dtcp.kernels.softmax.triton.bias import BiasGradients, BiasOperands, in_goes
from dtcp.kernels.softmax.triton.forward import forward_kernel
from dtcp.kernels.softmax.triton.ranges import find_key_ranges, find_query_tiles
from dtcp.kernels.softmax.triton.tiles import ScoreOperands, TileShape
from dtcp.kernels.softmax.types import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
)
from dtcp.kernels.triton_support import StridedTensor, tile_width


class TileConfig(NamedTuple):
    """Queries and keys that a program holds at a time, and how Triton runs it."""

    queries: int
    keys: int
    warps: int
    stages: int


class AttentionTiling(NamedTuple):
    """The tiles of the three kernels."""

    forward: TileConfig
    query_gradients: TileConfig
    key_gradients: TileConfig


HALF_TILINGS = (
    (
        64,
        AttentionTiling(
            TileConfig(128, 128, 8, 2), TileConfig(128, 64, 8, 3), TileConfig(64, 128, 8, 2)
        ),
    ),
    (
        128,
        AttentionTiling(
            TileConfig(128, 128, 8, 2), TileConfig(128, 64, 8, 3), TileConfig(32, 128, 8, 2)
        ),
    ),
    (
        256,
        AttentionTiling(
            TileConfig(128, 64, 8, 2), TileConfig(64, 64, 8, 2), TileConfig(32, 64, 8, 2)
        ),
    ),
    (
        512,
        AttentionTiling(
            TileConfig(64, 32, 8, 2), TileConfig(32, 32, 8, 2), TileConfig(32, 32, 8, 1)
        ),
    ),
)
"""By widest head, for bf16 and fp16, which tensor cores multiply."""

BIASED_TILINGS = (
    (128, HALF_TILINGS[2][1]),
    (256, HALF_TILINGS[3][1]),
    (
        512,
        AttentionTiling(
            TileConfig(32, 32, 8, 2), TileConfig(32, 32, 8, 1), TileConfig(32, 32, 8, 1)
        ),
    ),
)
"""The same with a bias by rows, which holds as many numbers as there are scores."""

FULL_TILINGS = (
    (128, AttentionTiling(*(TileConfig(32, 32, 4, 1),) * 3)),
    (512, AttentionTiling(*(TileConfig(16, 16, 4, 1),) * 3)),
)
"""By widest head, for fp32, which tensor cores would round."""


def attention_tiling(k: Tensor, v: Tensor, bias: ScoreBias | None = None) -> AttentionTiling:
    """The tiles for these widths, this dtype and the GPU's shared memory."""
    widest = max(k.shape[-1], v.shape[-1])
    width = tile_width(k, widest)
    tilings: Sequence[tuple[int, AttentionTiling]] = HALF_TILINGS
    if k.dtype == torch.float32:
        tilings = FULL_TILINGS
    elif bias is not None and bias.has_rows:
        tilings = BIASED_TILINGS
    return next(tiling for upper, tiling in tilings if width <= upper)


class TritonAttention:
    """`AttentionKernel` for the tensors that `triton_runs_on` accepts."""

    def attend(
        self, state: OnlineSoftmax, queries: Queries, keys: Keys, params: SoftmaxParams
    ) -> None:
        if keys.k.shape[1] == 0:
            return
        for own, part in in_goes(queries):
            _attend(OnlineSoftmax(*(x[:, own] for x in state)), part, keys, params)

    def attend_backward(
        self,
        grads: GradAccumulators,
        saved: SavedForward,
        queries: Queries,
        keys: Keys,
        params: SoftmaxParams,
    ) -> None:
        if keys.k.shape[1] == 0:
            return
        for own, part in in_goes(queries):
            sums = GradAccumulators(grads.dq[:, own], grads.dk, grads.dv)
            _attend_backward(sums, SavedForward(*(x[:, own] for x in saved)), part, keys, params)


def _attend(state: OnlineSoftmax, queries: Queries, keys: Keys, params: SoftmaxParams) -> None:
    q, (k, v, key_index) = queries.q, keys[:3]
    batch, length, heads, _ = q.shape
    tile = attention_tiling(k, v, queries.bias).forward
    bias = BiasOperands.of(queries.bias, q, key_index)
    with torch.cuda.device_of(q):
        ranges = find_key_ranges(queries, keys, tile.queries)
        forward_kernel[(triton.cdiv(length, tile.queries), heads, batch)](
            *(StridedTensor.of(x) for x in (q, k, v, *state)),
            ranges.operands(batch),
            length,
            heads // k.shape[2],
            ScoreOperands(params.scale, params.softcap),
            bias,
            TileShape.of(k, v, tile[:2], params.softcap, biased=bias is not None),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def _attend_backward(
    grads: GradAccumulators,
    saved: SavedForward,
    queries: Queries,
    keys: Keys,
    params: SoftmaxParams,
) -> None:
    q, (k, v, key_index) = queries.q, keys[:3]
    batch, length, heads, _ = q.shape
    num_keys, groups = k.shape[1:3]
    tiling = attention_tiling(k, v, queries.bias)
    scores = ScoreOperands(params.scale, params.softcap)
    bias = BiasOperands.of(queries.bias, q, key_index)
    bias_gradients = BiasGradients.empty(queries.bias, q)
    delta = torch.empty_like(saved.lse)
    with torch.cuda.device_of(q):
        ranges = find_key_ranges(queries, keys, tiling.key_gradients.queries)
        tile = tiling.query_gradients
        query_gradient_kernel[(triton.cdiv(length, tile.queries), heads, batch)](
            *(StridedTensor.of(x) for x in (q, k, v, *saved, delta, grads.dq)),
            ranges.operands(batch),
            length,
            heads // groups,
            scores,
            bias,
            bias_gradients,
            TileShape.of(k, v, tile[:2], params.softcap, biased=bias is not None),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if queries.bias is not None and bias_gradients is not None:
            bias_gradients.add_to(queries.bias)
        tile = tiling.key_gradients
        sources = (q, k, v, saved.grad_out, saved.lse, delta, grads.dk, grads.dv)
        key_gradient_kernel[(triton.cdiv(num_keys, tile.keys), groups, batch)](
            *(StridedTensor.of(x) for x in sources),
            ranges.operands(batch),
            find_query_tiles(ranges, num_keys, tile.keys, batch),
            length,
            num_keys,
            heads // groups,
            scores,
            bias,
            TileShape.of(k, v, tile[:2], params.softcap, biased=bias is not None),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
