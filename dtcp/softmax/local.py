"""Attention on one device: every key is here already."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.softmax.api import (
    Final,
    Gradients,
    Keys,
    Partial,
    Queries,
    attend,
    attend_backward,
    local_sink_gradient,
    zeros_for,
)
from dtcp.kernels.softmax.block_ranges import TILE, key_spans
from dtcp.softmax.op import (
    AttentionOp,
    Call,
    Given,
    Kept,
)


class LocalTables(NamedTuple):
    """What attention on one device reads: for one mask and one batch.

    In all tables, int32 goes to the device of the batch and int64 stays on the host.
    """

    first_key: Tensor  # [B, S] int32
    last_key: Tensor  # [B, S] int32
    key_position: Tensor  # [S] int32
    spans: Tensor  # [B, tiles, 6] int64


def local_tables(first_key: Tensor, last_key: Tensor, *, tile: int = TILE) -> LocalTables:
    """Tables for whole rows in position order, from the intervals of a mask: [B, S] each."""
    position = torch.arange(first_key.shape[1], dtype=torch.int32)
    spans = key_spans(first_key, last_key, position, tile=tile)
    return LocalTables(first_key, last_key, position, spans)


class Local:
    """No exchange at all; also what Ulysses does with its heads once it holds the sequence."""

    keeps_own_form = False

    def forward(self, x: Given, call: Call) -> Kept:
        tables = LocalTables(*call.tables)
        partial = Partial.empty(x.q, x.v.shape[-1])
        queries = Queries.of(x.q, tables.first_key, tables.last_key)
        attend(partial, queries, Keys(x.k, x.v, tables.key_position), tables.spans, call.how)
        out, lse = partial.finish(x.sink, x.q.dtype)
        return Kept(out, [lse])

    def backward(self, grad_out: Tensor, x: Given, kept: Kept, call: Call) -> Given:
        tables = LocalTables(*call.tables)
        final = Final(grad_out, kept.out, kept.saved[0])
        grads = Gradients(zeros_for(x.q), zeros_for(x.k), zeros_for(x.v))
        queries = Queries.of(x.q, tables.first_key, tables.last_key)
        keys = Keys(x.k, x.v, tables.key_position)
        attend_backward(grads, final, queries, keys, tables.spans, call.how)
        return Given(*grads, local_sink_gradient(final, x.sink))

    def saved_like(self, x: Given, groups: Sequence[str]) -> list[Tensor]:
        return [x.q.new_empty(x.q.shape[:-1], dtype=accumulation(x.q.dtype))]


ATTENTION = AttentionOp("attention", Local())
