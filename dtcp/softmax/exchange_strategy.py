"""Strategies that bring keys to the queries of each rank, whatever travels for a key."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dtcp.distributed.moves import Moves
from dtcp.kernels.softmax.api import Queries, SavedForward, check_kernel, local_sink_gradient
from dtcp.softmax.inputs import SCORE_BIAS, AttentionInputs, check_key_count
from dtcp.softmax.metadata import KeyExchangeMetadata
from dtcp.softmax.moves import AttentionShape, Peers, keys_moved
from dtcp.softmax.payload import KVPayload, payload_of
from dtcp.softmax.strategy import ForwardResult, OpContext


class ExchangeStrategy:
    """A strategy that exchanges keys and does not look into what travels for them."""

    keeps_own_form = False
    takes_values_only = True
    takes_latents = True

    def metadata_of(self, tensors: Sequence[Tensor]) -> KeyExchangeMetadata:
        return KeyExchangeMetadata.of_tensors(tensors)

    def attend(
        self, queries: Queries, payload: KVPayload, sink: Tensor | None, context: OpContext
    ) -> tuple[Tensor, ...]:
        """out [B, L, H, V] in q's dtype, lse [B, L, H], and what backward is given again."""
        raise NotImplementedError

    def attend_backward(
        self,
        queries: Queries,
        payload: KVPayload,
        saved: SavedForward,
        kept: Sequence[Tensor],
        context: OpContext,
    ) -> tuple[Tensor, Tensor]:
        """dq and the gradients of the local rows [B, L, G, W]."""
        raise NotImplementedError

    def forward(self, x: AttentionInputs, context: OpContext) -> ForwardResult:
        metadata: KeyExchangeMetadata = context.metadata
        check_key_count(x, metadata.own_keys)
        payload = payload_of(x, context)
        queries = x.queries(metadata)
        # Not in the midst of a ring: what is on its way then is in the way of all that follows.
        kv_heads = x.v.shape[2] if x.up is None else x.q.shape[2]
        widths = {"kv_heads": kv_heads, "value_width": x.value_width}
        check_kernel(queries, **widths, params=context.softmax)
        out, *saved = self.attend(queries, payload, x.sink, context)
        return ForwardResult(out, saved)

    def backward(
        self, grad_out: Tensor, x: AttentionInputs, result: ForwardResult, context: OpContext
    ) -> AttentionInputs:
        payload, queries = payload_of(x, context), x.queries(context.metadata)
        lse, *kept = result.saved
        saved = SavedForward(grad_out, result.out, lse)
        dq, rows = self.attend_backward(queries, payload, saved, kept, context)
        dk, dv, dkey_scale, dup = payload.input_gradients(rows)
        dsink = local_sink_gradient(saved, x.sink)
        return AttentionInputs(dq, dk, dv, dsink, dkey_scale, dup, **bias_gradients(queries))

    def saved_like(
        self, x: AttentionInputs, metadata: KeyExchangeMetadata, group_sizes: Sequence[int]
    ) -> list[Tensor]:
        return [x.empty_lse()]

    def moves(
        self, shape: AttentionShape, length: int, metadata: KeyExchangeMetadata, peers: Peers
    ) -> Moves:
        sent, received = metadata.moved.tolist()
        return keys_moved(shape, sent, received, metadata.own_keys, peers.rank)


def bias_gradients(queries: Queries) -> dict[str, Any]:
    """Gradients of what a score bias is made of, over this rank's queries, by name."""
    gradients = () if queries.bias is None else queries.bias.gradients
    return dict(zip(SCORE_BIAS, gradients, strict=False))
