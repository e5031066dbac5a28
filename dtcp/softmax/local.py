"""Attention on one device: every key is here already."""

from collections.abc import Sequence

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
from dtcp.softmax.metadata import LocalMetadata
from dtcp.softmax.op import (
    AttentionInputs,
    AttentionOp,
    ForwardResult,
    OpContext,
    check_key_count,
)


class _Local:
    """No exchange at all; also what Ulysses does with its heads once it holds the sequence."""

    keeps_own_form = False
    takes_values_only = False

    def forward(self, x: AttentionInputs, context: OpContext) -> ForwardResult:
        assert x.k is not None
        metadata = LocalMetadata(*context.metadata)
        check_key_count(x, metadata.key_token_index.numel())
        partial = OnlineSoftmax.empty(x.q, x.v.shape[-1])
        queries = Queries.of(x.q, metadata.first_key, metadata.last_key)
        keys = Keys(x.k, x.v, metadata.key_token_index)
        attend(partial, queries, keys, metadata.block_ranges, context.softmax)
        out, lse = partial.finish(x.sink, x.q.dtype)
        return ForwardResult(out, [lse])

    def backward(
        self, grad_out: Tensor, x: AttentionInputs, result: ForwardResult, context: OpContext
    ) -> AttentionInputs:
        assert x.k is not None
        metadata = LocalMetadata(*context.metadata)
        saved = SavedForward(grad_out, result.out, result.saved[0])
        grads = GradAccumulators(zeros_for(x.q), zeros_for(x.k), zeros_for(x.v))
        queries = Queries.of(x.q, metadata.first_key, metadata.last_key)
        keys = Keys(x.k, x.v, metadata.key_token_index)
        attend_backward(grads, saved, queries, keys, metadata.block_ranges, context.softmax)
        return AttentionInputs(*grads, local_sink_gradient(saved, x.sink))

    def saved_like(self, x: AttentionInputs, groups: Sequence[str]) -> list[Tensor]:
        return [x.q.new_empty(x.q.shape[:-1], dtype=accumulation(x.q.dtype))]


LOCAL = _Local()
ATTENTION = AttentionOp("attention", LOCAL, communicates=False)
