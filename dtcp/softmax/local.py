"""Attention on one device: every key is here already."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.softmax.api import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    attend,
    attend_backward,
    local_sink_gradient,
    zeros_for,
)
from dtcp.kernels.softmax.block_ranges import TILE, block_ranges
from dtcp.softmax.op import (
    AttentionInputs,
    AttentionOp,
    ForwardResult,
    OpContext,
)


class LocalMetadata(NamedTuple):
    """What attention on one device reads: for one mask and one batch.

    In all tables, int32 goes to the device of the batch and int64 stays on the host.
    """

    first_key: Tensor  # [B, S] int32
    last_key: Tensor  # [B, S] int32
    key_token_index: Tensor  # [S] int32
    spans: Tensor  # [B, tiles, 6] int64


def local_metadata(first_key: Tensor, last_key: Tensor, *, tile: int = TILE) -> LocalMetadata:
    """Tables for whole rows in position order, from the intervals of a mask: [B, S] each."""
    token_index = torch.arange(first_key.shape[1], dtype=torch.int32)
    spans = block_ranges(first_key, last_key, token_index, tile=tile)
    return LocalMetadata(first_key, last_key, token_index, spans)


class Local:
    """No exchange at all; also what Ulysses does with its heads once it holds the sequence."""

    keeps_own_form = False

    def forward(self, x: AttentionInputs, call: OpContext) -> ForwardResult:
        metadata = LocalMetadata(*call.metadata)
        partial = OnlineSoftmax.empty(x.q, x.v.shape[-1])
        queries = Queries.of(x.q, metadata.first_key, metadata.last_key)
        attend(partial, queries, Keys(x.k, x.v, metadata.key_token_index), metadata.spans, call.how)
        out, lse = partial.finish(x.sink, x.q.dtype)
        return ForwardResult(out, [lse])

    def backward(
        self, grad_out: Tensor, x: AttentionInputs, kept: ForwardResult, call: OpContext
    ) -> AttentionInputs:
        metadata = LocalMetadata(*call.metadata)
        final = SavedForward(grad_out, kept.out, kept.saved[0])
        grads = GradAccumulators(zeros_for(x.q), zeros_for(x.k), zeros_for(x.v))
        queries = Queries.of(x.q, metadata.first_key, metadata.last_key)
        keys = Keys(x.k, x.v, metadata.key_token_index)
        attend_backward(grads, final, queries, keys, metadata.spans, call.how)
        return AttentionInputs(*grads, local_sink_gradient(final, x.sink))

    def saved_like(self, x: AttentionInputs, groups: Sequence[str]) -> list[Tensor]:
        return [x.q.new_empty(x.q.shape[:-1], dtype=accumulation(x.q.dtype))]


ATTENTION = AttentionOp("attention", Local(), communicates=False)
