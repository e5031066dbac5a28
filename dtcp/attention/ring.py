"""Attend to one shard's keys after another while the next ones travel."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.attention.needed import KeyTables, keys_received, step_by_step_tables
from dtcp.attention.transport import Transfer, add_home, pack, post, unpack
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
from dtcp.kernels.spans import TILE
from dtcp.layout import SequenceLayout
from dtcp.style import AttentionShape, AttentionStyle, Received

_GRADIENTS = 1  # tag of gradient transfers; keys travel under 0


class _Ring:
    """n steps; at most two shards' keys are held: the one attended to and the one arriving."""

    keeps_own_form = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, call: Call
    ) -> tuple[Tensor, list[Tensor]]:
        tables = KeyTables(*call.tables)
        partial = Partial.empty(q, v.shape[-1])
        queries = Queries.of(q, tables.first_key, tables.last_key)
        for step, keys in _steps(k, v, tables, call):
            attend(partial, queries, keys, tables.spans[step], call.how)
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
        tables = KeyTables(*call.tables)
        final = Final(grad_out, out, saved[0])
        queries = Queries.of(q, tables.first_key, tables.last_key)
        dq, dk, dv = zeros_for(q), zeros_for(k), zeros_for(v)
        sent = tables.counts[0].tolist()
        slots = tables.send_slot[: sum(sent)].split(sent)
        going_home: Transfer | None = None
        for step, keys in _steps(k, v, tables, call):
            here = (dk, dv) if step == 0 else (zeros_for(keys.k), zeros_for(keys.v))
            grads = Gradients(dq, *here)
            attend_backward(grads, final, queries, keys, tables.spans[step], call.how)
            if step == 0:
                continue
            if going_home is not None:
                add_home(dk, dv, going_home.wait(), slots[step - 1])
            rows = torch.cat(here, dim=-1).transpose(0, 1).to(k.dtype).contiguous()
            going_home = post(rows, sent[step], -step, call, tag=_GRADIENTS)
        if going_home is not None:
            add_home(dk, dv, going_home.wait(), slots[-1])
        return dq, dk, dv, local_sink_gradient(final, sink)

    def saved_like(self, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[str]) -> list[Tensor]:
        return [q.new_empty(q.shape[:-1], dtype=accumulation(q.dtype))]


def _steps(k: Tensor, v: Tensor, tables: KeyTables, call: Call):  # type: ignore[no-untyped-def]
    """(step, keys) from this rank's own on; the next step's transfer is under way already."""
    sent, received = tables.counts.tolist()
    slots = tables.send_slot[: sum(sent)].split(sent)
    arriving: Transfer | None = None
    for step in range(len(sent)):
        if arriving is not None:
            k_here, v_here = unpack(arriving.wait(), k.shape[-1])
        else:
            k_here, v_here = k, v
        ahead = step + 1
        if ahead < len(sent):
            arriving = post(pack(k, v, slots[ahead]), received[ahead], ahead, call)
        yield step, Keys(k_here, v_here, tables.key_position[step, : k_here.shape[1]])


RING = AttentionOp("ring_attention", _Ring())


@dataclass
class RingAttention(AttentionStyle):
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

    def make_tables(
        self,
        layout: SequenceLayout,
        rank: int,
        intervals: tuple[Tensor, Tensor],
        *,
        tile: int = TILE,
    ) -> tuple[Tensor, ...]:
        return step_by_step_tables(layout, rank, intervals, tile=tile)

    def received(
        self,
        layout: SequenceLayout,
        rank: int,
        intervals: tuple[Tensor, Tensor],
        shape: AttentionShape,
    ) -> Received:
        return keys_received(layout, rank, intervals, shape)
