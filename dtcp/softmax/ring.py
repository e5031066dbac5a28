"""Attend to one shard's keys after another while the next ones travel."""

from collections.abc import Iterator
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
from dtcp.softmax.exchange import Transfer, accumulate_returned_grads, isend_irecv
from dtcp.softmax.op import AttentionOp, OpContext
from dtcp.softmax.payload import ExchangeStrategy, KVPayload
from dtcp.softmax.required_keys import KeyExchangeMetadata, NeededKeysAttention, ring_metadata
from dtcp.softmax.values_op import ValuesOp

_GRADIENTS = 1  # tag of gradient transfers; keys travel under 0


class _Ring(ExchangeStrategy):
    """n steps; at most two shards' keys are held: the one attended to and the one arriving."""

    def attend(
        self, q: Tensor, carried: KVPayload, sink: Tensor | None, call: OpContext
    ) -> tuple[Tensor, Tensor]:
        metadata = KeyExchangeMetadata(*call.metadata)
        queries = Queries.of(q, metadata.first_key, metadata.last_key)
        partial = None
        for step, keys in _steps(carried, metadata, call):
            if partial is None:
                partial = OnlineSoftmax.empty(q, keys.v.shape[-1])
            attend(partial, queries, keys, metadata.spans[step], call.how)
        assert partial is not None
        return partial.finish(sink, q.dtype)

    def attend_backward(
        self, q: Tensor, carried: KVPayload, final: SavedForward, call: OpContext
    ) -> tuple[Tensor, Tensor]:
        metadata, dq = KeyExchangeMetadata(*call.metadata), zeros_for(q)
        queries = Queries.of(q, metadata.first_key, metadata.last_key)
        sent = metadata.counts[0].tolist()
        slots = metadata.send_slot[: sum(sent)].split(sent)
        here, going_home = torch.empty(0), None
        for step, keys in _steps(carried, metadata, call):
            sums = carried.sums(keys.v.shape[1])
            grads = GradAccumulators(dq, sums.dk, sums.dv)
            attend_backward(grads, final, queries, keys, metadata.spans[step], call.how)
            found = carried.close(sums, keys.v, step)
            if step == 0:
                here = found
                continue
            if going_home is not None:
                accumulate_returned_grads(here, going_home.wait(), slots[step - 1])
            rows = found.transpose(0, 1).to(q.dtype).contiguous()
            going_home = isend_irecv(rows, sent[step], -step, call, tag=_GRADIENTS)
        if going_home is not None:
            accumulate_returned_grads(here, going_home.wait(), slots[-1])
        return dq, here


def _steps(
    carried: KVPayload, metadata: KeyExchangeMetadata, call: OpContext
) -> Iterator[tuple[int, Keys]]:
    """(step, keys) from this rank's own on; the next step's transfer is under way already."""
    sent, received = metadata.counts.tolist()
    slots = metadata.send_slot[: sum(sent)].split(sent)
    arriving: Transfer | None = None
    for step in range(len(sent)):
        if arriving is not None:
            k, v = carried.arrived(arriving.wait(), step)
        else:
            k, v = carried.here(step)
        ahead = step + 1
        if ahead < len(sent):
            arriving = isend_irecv(carried.pack(slots[ahead]), received[ahead], ahead, call)
        yield step, Keys(k, v, metadata.key_token_index[step, : k.shape[1]])


RING = AttentionOp("ring_attention", _Ring())
RING_VALUES = ValuesOp("ring_values_attention", _Ring())


@dataclass
class RingAttention(NeededKeysAttention):
    """Attention that streams the other shards' keys past its queries.

    Step s attends to what came from s ranks back while step s + 1 is on its way. A rank never
    holds more than two shards' keys, and steps (or parts of them) that the mask makes empty are
    neither sent nor computed.

    Keyword Args:
        boundary: InGraph() or EagerIsland().

    Traffic per rank, received: keys needed from others x B * G * (D + V) elements forward, at
    most (n - 1) * L of them; the same again backward, and their gradients home.
    From Liu et al. 2023, Ring Attention, section 3, https://arxiv.org/abs/2310.01889; transfers
    go straight from owner to user, so nothing is passed on for others.
    """

    @property
    def op(self) -> AttentionOp:
        return RING

    @property
    def values_op(self) -> ValuesOp:
        return RING_VALUES

    def make_metadata(
        self,
        layout: SequenceLayout,
        rank: int,
        intervals: tuple[Tensor, Tensor],
        *,
        tile: int = TILE,
    ) -> tuple[Tensor, ...]:
        return ring_metadata(layout, rank, intervals, tile=tile)
