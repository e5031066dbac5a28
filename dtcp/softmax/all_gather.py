"""Bring every key a rank requires in one exchange, then attend once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dtcp.kernels.softmax.api import (
    GradAccumulators,
    Keys,
    Queries,
    SavedForward,
    attend_backward,
    attend_once,
    note_rounded_sums,
    zeros_for,
)
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.exchange import bring_rows, return_grads
from dtcp.softmax.exchange_strategy import ExchangeStrategy
from dtcp.softmax.metadata import KeyExchangeMetadata, all_gather_metadata
from dtcp.softmax.op import AttentionOp
from dtcp.softmax.payload import KVPayload
from dtcp.softmax.strategy import OpContext
from dtcp.softmax.style import AttentionStyle


class AllGather(ExchangeStrategy):
    """One all_to_all out, two between nodes; backward brings keys again and returns gradients."""

    def attend(
        self, queries: Queries, payload: KVPayload, sink: Tensor | None, context: OpContext
    ) -> tuple[Tensor, ...]:
        metadata: KeyExchangeMetadata = context.metadata
        rows = self._bring(payload, metadata, context)
        keys = _in_token_order(payload, rows, metadata)
        wide = context.softmax.wide and queries.are_split  # else nothing is merged
        softmax = replace(context.softmax, wide=wide)
        result = attend_once(queries, keys, softmax, sink=sink)
        return *result, *self.kept(rows, metadata)

    def attend_backward(
        self,
        queries: Queries,
        payload: KVPayload,
        saved: SavedForward,
        kept: Sequence[Tensor],
        context: OpContext,
    ) -> tuple[Tensor, Tensor]:
        metadata: KeyExchangeMetadata = context.metadata
        rows = self.rows_of(kept, metadata) if kept else self._bring(payload, metadata, context)
        keys = _in_token_order(payload, rows, metadata)
        buffers, dq = payload.grad_buffers(keys.v.shape[1]), zeros_for(queries.q)
        grads = GradAccumulators(dq, buffers.dk, buffers.dv)
        if metadata.counts.shape[1] > 1 or context.shares_kv_heads:
            note_rounded_sums(queries, keys, context.softmax)
        attend_backward(grads, saved, queries, keys, context.softmax)

        of_keys = payload.finish(buffers, keys.v, 0).transpose(0, 1)
        dtype = context.grad_dtype(queries.q.dtype)
        return dq, return_grads(of_keys, metadata, dtype, context)

    def kept(self, rows: Tensor, metadata: KeyExchangeMetadata) -> list[Tensor]:
        """What backward is given again of the rows that arrived: nothing, they are many."""
        return []

    def rows_of(self, kept: Sequence[Tensor], metadata: KeyExchangeMetadata) -> Tensor:
        """The rows that arrived, of what was kept."""
        raise NotImplementedError

    def _bring(
        self, payload: KVPayload, metadata: KeyExchangeMetadata, context: OpContext
    ) -> Tensor:
        """The required rows of other ranks, [m, B, G, W]."""
        packed = payload.pack(metadata.send_slot[: int(metadata.counts[0].sum())])
        return bring_rows(packed, metadata, context)


def _in_token_order(payload: KVPayload, rows: Tensor, metadata: KeyExchangeMetadata) -> Keys:
    """Local and required keys."""
    return metadata.keys_of(0, *payload.in_order(rows, metadata.key_order))


ALL_GATHER = AttentionOp("all_gather_attention", AllGather(), communicates=True)


@dataclass
class AllGatherAttention(AttentionStyle):
    """Attention that first brings all keys its queries require, in one exchange.

    One collective each way, and kernels see one long run of keys; a rank holds all the keys it
    requires while it attends (not after). For the whole sequence in little memory: RingAttention.

    Keyword Args:
        boundary: InGraph() or EagerIsland().
        reduce_dtype: of gradients of keys, as of AttentionStyle.
        ranks_per_node: neighbours that share a node: a key then crosses to each node that reads it
            once, and is spread inside; gradients are summed inside a node and go home once. One
            more collective each way.

    Traffic per rank, received: keys required from others x B * G * (D + V) elements forward, at
    most (n - 1) * L of them; the same again backward, and their gradients home. In two tiers as
    much in all; between nodes, each key once per node that reads it.
    From Llama 3 team 2024, section 3.3.2, https://arxiv.org/abs/2407.21783
    """

    takes_memory = True

    @property
    def op(self) -> AttentionOp:
        return ALL_GATHER

    def rank_metadata(
        self, layout: SequenceLayout, rank: int, intervals: KeyIntervals
    ) -> KeyExchangeMetadata:
        return all_gather_metadata(
            layout, rank, intervals, tile=self.tile, ranks_per_node=self.ranks_per_node
        )
