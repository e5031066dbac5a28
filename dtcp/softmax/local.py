"""Attention on one device: every key is here already."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from dtcp.distributed.moves import NOTHING, Moves
from dtcp.kernels.softmax.api import (
    Keys,
    SavedForward,
    attend_once,
    attend_once_backward,
    local_sink_gradient,
    note_rounded_sums,
)
from dtcp.softmax.exchange_strategy import bias_gradients
from dtcp.softmax.inputs import AttentionInputs, check_key_count
from dtcp.softmax.metadata import LocalMetadata
from dtcp.softmax.moves import AttentionShape, Peers
from dtcp.softmax.op import AttentionOp
from dtcp.softmax.strategy import ForwardResult, OpContext


class _Local:
    """No exchange at all; also what Ulysses does with its heads once it holds the sequence."""

    keeps_own_form = False
    takes_values_only = False
    takes_latents = False

    def metadata_of(self, tensors: Sequence[Tensor]) -> LocalMetadata:
        return LocalMetadata.of_tensors(tensors)

    def forward(self, x: AttentionInputs, context: OpContext) -> ForwardResult:
        assert x.k is not None
        metadata: LocalMetadata = context.metadata
        check_key_count(x, metadata.key_token_index.numel())
        queries, keys = x.queries(metadata), _keys(x, metadata)
        wide = context.softmax.wide and queries.are_split  # else nothing is merged
        softmax = replace(context.softmax, wide=wide)
        out, lse = attend_once(queries, keys, softmax, sink=x.sink)
        return ForwardResult(out, [lse])

    def backward(
        self, grad_out: Tensor, x: AttentionInputs, result: ForwardResult, context: OpContext
    ) -> AttentionInputs:
        assert x.k is not None
        metadata: LocalMetadata = context.metadata
        saved = SavedForward(grad_out, result.out, result.saved[0])
        queries, keys = x.queries(metadata), _keys(x, metadata)
        if context.shares_kv_heads:
            note_rounded_sums(queries, keys, context.softmax)
        grads = attend_once_backward(saved, queries, keys, context.softmax)
        dsink = local_sink_gradient(saved, x.sink)
        return AttentionInputs(*grads, dsink, **bias_gradients(queries))

    def saved_like(
        self, x: AttentionInputs, metadata: LocalMetadata, group_sizes: Sequence[int]
    ) -> list[Tensor]:
        return [x.empty_lse()]

    def moves(
        self, shape: AttentionShape, length: int, metadata: LocalMetadata, peers: Peers
    ) -> Moves:
        return NOTHING


def _keys(x: AttentionInputs, metadata: LocalMetadata) -> Keys:
    """In the queries' dtype: keys whose gradients are summed further may come in a wider one."""
    assert x.k is not None
    k, v = x.k.to(x.q.dtype), x.v.to(x.q.dtype)
    return Keys(k, v, metadata.key_token_index, metadata.block_ranges, metadata.pieces)


LOCAL = _Local()
ATTENTION = AttentionOp("attention", LOCAL, communicates=False)
