"""Interval attention by Triton's kernels: one launch for all tiles, heads and rows.

The functions of tiles.py, on a GPU. Every mask here is one interval of positions a query, so one
kernel is causal attention, windows, packed documents, prefixes, vision blocks and padding, in
any layout. Forward merges into the partial result where it stands, backward adds to the sums
where they stand, without atomics: the same bits every time.

The host's spans are not read and nothing waits for the host: what a tile meets is found on the
device (interval_runs.py). This module imports Triton, so attend.py imports it where it is used.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dtcp.kernels.softmax.triton.backward import key_gradients, query_gradients
from dtcp.kernels.softmax.triton.forward import attend_tile
from dtcp.kernels.softmax.triton.ranges import find_reach, find_runs
from dtcp.kernels.softmax.triton.tiles import How, Shape, View
from dtcp.kernels.softmax.types import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
)
from dtcp.kernels.triton_support import TILES_TAKE, tile_width


class Tiles(NamedTuple):
    """Queries and keys a program holds at a time, and how it is run."""

    queries: int
    keys: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tiles
    query_gradients: Tiles
    key_gradients: Tiles


HALF_PLANS = (
    (64, Plan(Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2))),
    (128, Plan(Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 3), Tiles(32, 128, 8, 2))),
    (256, Plan(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2))),
    (512, Plan(Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 1))),
)
"""By widest head, of bf16 and fp16, which tensor cores multiply."""

FULL_PLANS = (
    (128, Plan(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1))),
    (512, Plan(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1))),
)
"""By widest head, of fp32, which they would round."""


def plan_for(k: Tensor, v: Tensor) -> Plan:
    """The tiles for these widths, this dtype and the GPU's shared memory."""
    widest = tile_width(k, max(k.shape[-1], v.shape[-1]), shared=TILES_TAKE)
    plans = FULL_PLANS if k.dtype == torch.float32 else HALF_PLANS
    return next(plan for width, plan in plans if widest <= width)


def attend(
    partial: OnlineSoftmax, queries: Queries, keys: Keys, spans: Tensor, how: SoftmaxParams
) -> None:
    """Add the attention of `queries` to `keys` to `partial`."""
    if keys.k.shape[1] == 0:
        return
    q, (k, v, _) = queries.q, keys
    batch, length, heads, _ = q.shape
    tile = plan_for(k, v).forward
    with torch.cuda.device_of(q):
        runs = find_runs(queries, keys, tile.queries)
        attend_tile[(triton.cdiv(length, tile.queries), heads, batch)](
            *(View.of(x) for x in (q, k, v, *partial)),
            runs.views(batch),
            length,
            heads // k.shape[2],
            How(how.scale, how.softcap),
            Shape.of(k, v, tile[:2], how.softcap),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def attend_backward(
    grads: GradAccumulators,
    final: SavedForward,
    queries: Queries,
    keys: Keys,
    spans: Tensor,
    how: SoftmaxParams,
) -> None:
    """Add the gradients of `attend` over these keys to `grads`."""
    if keys.k.shape[1] == 0:
        return
    q, (k, v, _) = queries.q, keys
    batch, length, heads, _ = q.shape
    num_keys, groups = k.shape[1:3]
    plan, numbers = plan_for(k, v), How(how.scale, how.softcap)
    delta = torch.empty_like(final.lse)
    with torch.cuda.device_of(q):
        runs = find_runs(queries, keys, plan.key_gradients.queries)
        tile = plan.query_gradients
        query_gradients[(triton.cdiv(length, tile.queries), heads, batch)](
            *(View.of(x) for x in (q, k, v, *final, delta, grads.dq)),
            runs.views(batch),
            length,
            heads // groups,
            numbers,
            Shape.of(k, v, tile[:2], how.softcap),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        tile = plan.key_gradients
        key_gradients[(triton.cdiv(num_keys, tile.keys), groups, batch)](
            *(View.of(x) for x in (q, k, v, final.grad_out, final.lse, delta, grads.dk, grads.dv)),
            runs.views(batch),
            find_reach(runs, num_keys, tile.keys, batch),
            length,
            num_keys,
            heads // groups,
            numbers,
            Shape.of(k, v, tile[:2], how.softcap),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
