"""Attend to one shard's keys after another while the next ones travel."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.distributed.moves import Moves
from dtcp.distributed.staging import Transfer, transfer_stream
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
from dtcp.sequence.interval_runs import Intervals
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.exchange import accumulate_returned_grads, isend_irecv
from dtcp.softmax.metadata import KeyExchangeMetadata, ring_metadata
from dtcp.softmax.moves import AttentionShape, Peers, counts_by_step, steps_moved
from dtcp.softmax.op import AttentionOp, OpContext
from dtcp.softmax.payload import ExchangeStrategy, KVPayload
from dtcp.softmax.style import KeyExchangeAttention

_GRADIENTS = 1  # tag of gradient transfers; keys travel under 0


class _Ring(ExchangeStrategy):
    """n steps; at most two shards' keys are held: the one attended to and the one arriving."""

    def attend(
        self, queries: Queries, payload: KVPayload, sink: Tensor | None, context: OpContext
    ) -> tuple[Tensor, ...]:
        metadata = KeyExchangeMetadata(*context.metadata)
        partial = None
        for step, keys in _steps(payload, metadata, context):
            if partial is None:
                partial = OnlineSoftmax.empty(queries.q, keys.v.shape[-1])
            ranges, pieces = metadata.block_ranges[step], metadata.pieces[step]
            attend(partial, queries, keys, ranges, context.softmax, pieces=pieces)
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
        metadata, dq = KeyExchangeMetadata(*context.metadata), zeros_for(queries.q)
        sent = metadata.counts[0].tolist()
        slots = metadata.send_slot[: sum(sent)].split(sent)
        local, returning = torch.empty(0), None
        for step, keys in _steps(payload, metadata, context):
            buffers = payload.grad_buffers(keys.v.shape[1])
            grads = GradAccumulators(dq, buffers.dk, buffers.dv)
            ranges, pieces = metadata.block_ranges[step], metadata.pieces[step]
            attend_backward(grads, saved, queries, keys, ranges, context.softmax, pieces=pieces)
            of_step = payload.finish(buffers, keys.v, step)
            if step == 0:
                local = of_step
                continue
            if returning is not None:
                accumulate_returned_grads(local, returning.wait(), slots[step - 1])
            with transfer_stream(of_step):
                rows = of_step.transpose(0, 1).to(queries.q.dtype).contiguous()
                returning = isend_irecv(rows, sent[step], -step, context, tag=_GRADIENTS)
        if returning is not None:
            accumulate_returned_grads(local, returning.wait(), slots[-1])
        return dq, local

    def moves(
        self, shape: AttentionShape, length: int, metadata: Sequence[Tensor], peers: Peers
    ) -> Moves:
        keys = KeyExchangeMetadata(*metadata)
        sent, received = counts_by_step(keys.counts, peers.rank)
        return steps_moved(shape, sent, received, keys.own_keys, peers.rank, queries=length)


def _steps(
    payload: KVPayload, metadata: KeyExchangeMetadata, context: OpContext
) -> Iterator[tuple[int, Keys]]:
    """(step, keys) from this rank's own on; the next step's transfer is under way already."""
    sent, received = metadata.counts.tolist()
    slots = metadata.send_slot[: sum(sent)].split(sent)
    arriving: Transfer | None = None
    for step in range(len(sent)):
        if arriving is not None:
            k, v = payload.received(arriving.wait(), step)
        else:
            k, v = payload.local(step)
        ahead = step + 1
        if ahead < len(sent):
            with transfer_stream(slots[ahead]):
                packed = payload.pack(slots[ahead])
                arriving = isend_irecv(packed, received[ahead], ahead, context)
        yield step, Keys(k, v, metadata.key_token_index[step, : k.shape[1]])


RING = AttentionOp("ring_attention", _Ring(), communicates=True)


@dataclass
class RingAttention(KeyExchangeAttention):
    """Attention that streams the other shards' keys past its queries.

    Step s attends to what came from s ranks back while step s + 1 is on its way. A rank never
    holds more than two shards' keys, and steps (or parts of them) that the mask makes empty are
    neither sent nor computed.

    Keyword Args:
        boundary: InGraph() or EagerIsland().

    Traffic per rank, received: keys required from others x B * G * (D + V) elements forward, at
    most (n - 1) * L of them; the same again backward, and their gradients home.
    From Liu et al. 2023, Ring Attention, section 3, https://arxiv.org/abs/2310.01889; transfers
    go straight from owner to user, so nothing is passed on for others.
    """

    @property
    def op(self) -> AttentionOp:
        return RING

    def rank_metadata(
        self, layout: SequenceLayout, rank: int, intervals: Intervals
    ) -> KeyExchangeMetadata:
        return ring_metadata(layout, rank, intervals, tile=self.tile)
