"""Attend to one shard's keys after another while the next ones travel."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.distributed.moves import Moves
from dtcp.distributed.staging import transfer_stream
from dtcp.kernels.softmax.api import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    attend,
    attend_backward,
    note_merged_parts,
    note_rounded_sums,
    zeros_for,
)
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.exchange import (
    accumulate_returned_grads,
    isend_irecv,
    start_bringing,
    start_returning,
)
from dtcp.softmax.exchange_strategy import ExchangeStrategy
from dtcp.softmax.metadata import KeyExchangeMetadata, ring_metadata
from dtcp.softmax.moves import AttentionShape, Peers, counts_by_step, steps_moved
from dtcp.softmax.node_ring import NodeRing, node_ring_metadata, node_ring_moves
from dtcp.softmax.op import AttentionOp
from dtcp.softmax.payload import KVPayload
from dtcp.softmax.row_transfers import RowTransfer, StartRows
from dtcp.softmax.strategy import OpContext
from dtcp.softmax.style import AttentionStyle

_GRADIENTS = 1  # tag of gradient transfers; keys travel under 0


class _Ring(ExchangeStrategy):
    """n steps; at most two shards' keys are held: the one attended to and the one arriving."""

    def attend(
        self, queries: Queries, payload: KVPayload, sink: Tensor | None, context: OpContext
    ) -> tuple[Tensor, ...]:
        metadata: KeyExchangeMetadata = context.metadata
        partial = None
        for _, keys in _way_around(payload, context, queries.q.dtype).steps():
            if partial is None:
                partial = OnlineSoftmax.empty(queries.q, keys.v.shape[-1])
                if metadata.counts.shape[1] > 1 or queries.are_split:
                    note_merged_parts(queries, keys, context.softmax)
            attend(partial, queries, keys, context.softmax)
        assert partial is not None
        return partial.finish(sink, queries.q.dtype)

    def attend_backward(
        self,
        queries: Queries,
        payload: KVPayload,
        saved: SavedForward,
        kept: Sequence[Tensor],
        context: OpContext,
    ) -> tuple[Tensor, Tensor]:
        metadata: KeyExchangeMetadata = context.metadata
        dq = zeros_for(queries.q)
        way = _way_around(payload, context, context.grad_dtype(queries.q.dtype))
        for step, keys in way.steps():
            if step == 0 and (metadata.counts.shape[1] > 1 or context.shares_kv_heads):
                note_rounded_sums(queries, keys, context.softmax)
            buffers = payload.grad_buffers(keys.v.shape[1])
            grads = GradAccumulators(dq, buffers.dk, buffers.dv)
            attend_backward(grads, saved, queries, keys, context.softmax)
            way.returned(step, payload.finish(buffers, keys.v, step))
        return dq, way.finish()

    def moves(
        self, shape: AttentionShape, length: int, metadata: KeyExchangeMetadata, peers: Peers
    ) -> Moves:
        if metadata.onward_counts.numel():
            return node_ring_moves(shape, metadata, peers, queries=length)
        sent, received = counts_by_step(metadata.counts, peers.rank)
        return steps_moved(shape, sent, received, metadata.own_keys, peers.rank, queries=length)


def _way_around(
    payload: KVPayload, context: OpContext, dtype: torch.dtype
) -> "_RankRing | NodeRing":
    kind = NodeRing if context.metadata.onward_counts.numel() else _RankRing
    return kind(payload, context, dtype)


class _RankRing:
    """One call's way around the ranks; the next step's transfer is always under way already."""

    def __init__(self, payload: KVPayload, context: OpContext, dtype: torch.dtype) -> None:
        metadata: KeyExchangeMetadata = context.metadata
        self.payload, self.metadata, self.context = payload, metadata, context
        self.sent, self.received = metadata.counts.tolist()
        self.slots = metadata.send_slot[: sum(self.sent)].split(self.sent)
        self.dtype, self.local = dtype, torch.empty(0)
        # Gradients on their way home, and what they are packed from, which is read meanwhile.
        self._home: tuple[RowTransfer, Tensor] | None = None

    def steps(self) -> Iterator[tuple[int, Keys]]:
        """(step, keys), from this rank's own on."""
        payload, last = self.payload, len(self.sent) - 1
        arriving: RowTransfer | None = None
        for step in range(last + 1):
            if arriving is not None:
                k, v = payload.received(arriving.wait(), step)
            else:
                k, v = payload.local(step)
            if step < last:
                slots, count = self.slots[step + 1], self.received[step + 1]
                with transfer_stream(slots.device):
                    rows, start = payload.pack(slots), self._start(step + 1)
                    arriving = start_bringing(rows, [len(slots)], [count], self.context, start)
            yield step, self.metadata.keys_of(step, k, v)

    def returned(self, step: int, rows: Tensor) -> None:
        """Take in the gradients of a step's rows, [B, m, G, W], and send them home."""
        if step == 0:
            self.local = rows
            return
        self._add(step - 1)
        with transfer_stream(rows.device):
            send, receive = [self.received[step]], [self.sent[step]]
            arguments = (rows.transpose(0, 1), send, receive, self.dtype, self.context)
            self._home = start_returning(*arguments, self._start(-step, _GRADIENTS)), rows

    def finish(self) -> Tensor:
        """The gradients of all local rows [B, L, G, W], once those of other ranks are here."""
        self._add(len(self.sent) - 1)
        return self.local

    def _start(self, step: int, tag: int = 0) -> StartRows:
        return lambda rows, _, receive: isend_irecv(rows, receive[0], step, self.context, tag=tag)

    def _add(self, step: int) -> None:
        if self._home is not None:
            accumulate_returned_grads(self.local, self._home[0].wait(), self.slots[step])


RING = AttentionOp("ring_attention", _Ring(), communicates=True)


@dataclass
class RingAttention(AttentionStyle):
    """Attention that streams the other shards' keys past its queries.

    Step s attends to what came from s ranks back while step s + 1 is on its way. A rank never
    holds more than two shards' keys, and steps (or parts of them) that the mask makes empty are
    neither sent nor computed.

    Keyword Args:
        boundary: InGraph() or EagerIsland().
        reduce_dtype: of merged outputs and of gradients of keys, as of AttentionStyle.
        ranks_per_node: neighbours that share a node: steps then go from node to node. A key
            crosses to each node that reads it once, and is spread inside; gradients are summed
            inside a node and go home once. A rank then holds what it reads of three nodes.

    Traffic per rank, received: keys required from others x B * G * (D + V) elements forward, at
    most (n - 1) * L of them; the same again backward, and their gradients home. In two tiers as
    much in all; between nodes, each key once per node that reads it.
    From Liu et al. 2023, Ring Attention, section 3, https://arxiv.org/abs/2310.01889; transfers
    go straight from owner to user, so nothing is passed on for others.
    """

    takes_memory = True

    @property
    def op(self) -> AttentionOp:
        return RING

    def rank_metadata(
        self, layout: SequenceLayout, rank: int, intervals: KeyIntervals
    ) -> KeyExchangeMetadata:
        if self.ranks_per_node in (0, 1, layout.num_shards):
            return ring_metadata(layout, rank, intervals, tile=self.tile)
        return node_ring_metadata(
            layout, rank, intervals, tile=self.tile, ranks_per_node=self.ranks_per_node
        )
