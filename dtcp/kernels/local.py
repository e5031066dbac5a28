"""Attention on one device: every key is here already."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.attend import (
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
from dtcp.kernels.block import accumulation
from dtcp.kernels.op import AttentionOp, Call
from dtcp.kernels.spans import TILE, key_spans


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

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, call: Call
    ) -> tuple[Tensor, list[Tensor]]:
        tables = LocalTables(*call.tables)
        partial = Partial.empty(q, v.shape[-1])
        queries = Queries.of(q, tables.first_key, tables.last_key)
        attend(partial, queries, Keys(k, v, tables.key_position), tables.spans, call.how)
        out, lse = partial.finish(sink, q.dtype)
        return out, [lse]

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        out: Tensor,
        saved: list[Tensor],
        call: Call,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        tables = LocalTables(*call.tables)
        final = Final(grad_out, out, saved[0])
        grads = Gradients(zeros_for(q), zeros_for(k), zeros_for(v))
        queries = Queries.of(q, tables.first_key, tables.last_key)
        keys = Keys(k, v, tables.key_position)
        attend_backward(grads, final, queries, keys, tables.spans, call.how)
        return (*grads, local_sink_gradient(final, sink))

    def saved_like(self, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[str]) -> list[Tensor]:
        return [q.new_empty(q.shape[:-1], dtype=accumulation(q.dtype))]


ATTENTION = AttentionOp("attention", Local())
