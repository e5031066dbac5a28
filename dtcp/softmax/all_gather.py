"""Bring every key a rank needs in one exchange, then attend once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.kernels.softmax.api import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    attend,
    attend_backward,
    zeros_for,
)
from dtcp.kernels.softmax.block_ranges import TILE
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.exchange import accumulate_returned_grads, all_to_all_rows
from dtcp.softmax.op import AttentionOp, OpContext
from dtcp.softmax.payload import ExchangeStrategy, KVPayload
from dtcp.softmax.required_keys import KeyExchangeMetadata, NeededKeysAttention, all_gather_metadata
from dtcp.softmax.values_op import ValuesOp


class _AllGather(ExchangeStrategy):
    """One all_to_all out; backward brings the keys again and sends their gradients home."""

    def attend(
        self, q: Tensor, carried: KVPayload, sink: Tensor | None, call: OpContext
    ) -> tuple[Tensor, Tensor]:
        metadata = KeyExchangeMetadata(*call.metadata)
        queries = Queries.of(q, metadata.first_key, metadata.last_key)
        keys = self._bring(carried, q.shape[1], metadata, call)
        partial = OnlineSoftmax.empty(q, keys.v.shape[-1])
        attend(partial, queries, keys, metadata.spans[0], call.how)
        return partial.finish(sink, q.dtype)

    def attend_backward(
        self, q: Tensor, carried: KVPayload, final: SavedForward, call: OpContext
    ) -> tuple[Tensor, Tensor]:
        metadata, length = KeyExchangeMetadata(*call.metadata), q.shape[1]
        keys = self._bring(carried, length, metadata, call)
        sums, dq = carried.sums(keys.v.shape[1]), zeros_for(q)
        queries = Queries.of(q, metadata.first_key, metadata.last_key)
        grads = GradAccumulators(dq, sums.dk, sums.dv)
        attend_backward(grads, final, queries, keys, metadata.spans[0], call.how)

        rows = carried.close(sums, keys.v, 0).transpose(0, 1)
        return dq, return_grads(rows, metadata, length, q.dtype, call)

    def _bring(
        self, carried: KVPayload, length: int, metadata: KeyExchangeMetadata, call: OpContext
    ) -> Keys:
        """Local and needed keys, by ascending position."""
        send, receive = metadata.counts.tolist()
        rows = all_to_all_rows(carried.pack(metadata.send_slot[: sum(send)]), send, receive, call)
        order = sort_by_index(metadata, length)
        k, v = carried.lined_up(rows, order)
        return Keys(k, v, metadata.key_token_index[0, : order.numel()])


def sort_by_index(metadata: KeyExchangeMetadata, local: int) -> Tensor:
    """Where each lined-up key comes from: the local ones, then those that arrive."""
    return metadata.sort_by_index[: local + int(metadata.counts[1].sum())]


def return_grads(
    rows: Tensor, metadata: KeyExchangeMetadata, length: int, dtype: torch.dtype, call: OpContext
) -> Tensor:
    """Gradients of lined-up rows [K, B, G, W], summed where the rows came from: [B, L, G, W]."""
    arrival = torch.empty_like(rows).index_copy_(0, sort_by_index(metadata, length).long(), rows)
    here = arrival[:length].transpose(0, 1).contiguous()
    send, receive = metadata.counts.tolist()
    home = all_to_all_rows(arrival[length:].to(dtype), receive, send, call)
    accumulate_returned_grads(here, home, metadata.send_slot[: sum(send)])
    return here


ALL_GATHER = AttentionOp("all_gather_attention", _AllGather())
ALL_GATHER_VALUES = ValuesOp("all_gather_values_attention", _AllGather())


@dataclass
class AllGatherAttention(NeededKeysAttention):
    """Attention that first brings all keys its queries need, in one exchange.

    One collective each way, and kernels see one long run of keys; a rank holds all the keys it
    needs while it attends (not after). For the whole sequence in little memory: RingAttention.

    Keyword Args:
        boundary: InGraph() or EagerIsland().

    Traffic per rank, received: keys needed from others x B * G * (D + V) elements forward, at
    most (n - 1) * L of them; the same again backward, and their gradients home.
    From Llama 3 team 2024, section 3.3.2, https://arxiv.org/abs/2407.21783
    """

    @property
    def op(self) -> AttentionOp:
        return ALL_GATHER

    @property
    def values_op(self) -> ValuesOp:
        return ALL_GATHER_VALUES

    def make_metadata(
        self,
        layout: SequenceLayout,
        rank: int,
        intervals: tuple[Tensor, Tensor],
        *,
        tile: int = TILE,
    ) -> tuple[Tensor, ...]:
        return all_gather_metadata(layout, rank, intervals, tile=tile)
