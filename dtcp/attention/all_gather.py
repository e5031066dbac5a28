"""Bring every key a rank needs in one exchange, then attend once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.attention.needed import KeyTables, all_at_once_tables, keys_received
from dtcp.attention.transport import add_home, exchange, pack, unpack
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


class _AllGather:
    """One all_to_all out; backward brings the keys again and sends their gradients home."""

    keeps_own_form = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, call: Call
    ) -> tuple[Tensor, list[Tensor]]:
        tables = KeyTables(*call.tables)
        partial = Partial.empty(q, v.shape[-1])
        queries = Queries.of(q, tables.first_key, tables.last_key)
        keys = self._bring(k, v, tables, call)
        attend(partial, queries, keys, tables.spans[0], call.how)
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
        keys = self._bring(k, v, tables, call)
        grads = Gradients(zeros_for(q), zeros_for(keys.k), zeros_for(keys.v))
        queries = Queries.of(q, tables.first_key, tables.last_key)
        attend_backward(grads, final, queries, keys, tables.spans[0], call.how)

        length = k.shape[1]
        rows = torch.cat((grads.dk, grads.dv), dim=-1).transpose(0, 1)
        arrival = torch.empty_like(rows).index_copy_(0, _line_up(tables, length).long(), rows)
        dk, dv = (x.contiguous() for x in unpack(arrival[:length], k.shape[-1]))
        send, receive = tables.counts.tolist()
        home = exchange(arrival[length:].to(k.dtype), receive, send, call)
        add_home(dk, dv, home, tables.send_slot[: sum(send)])
        return grads.dq, dk, dv, local_sink_gradient(final, sink)

    def saved_like(self, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[str]) -> list[Tensor]:
        return [q.new_empty(q.shape[:-1], dtype=accumulation(q.dtype))]

    def _bring(self, k: Tensor, v: Tensor, tables: KeyTables, call: Call) -> Keys:
        """Local and needed keys, by ascending position."""
        send, receive = tables.counts.tolist()
        rows = exchange(pack(k, v, tables.send_slot[: sum(send)]), send, receive, call)
        far_k, far_v = unpack(rows, k.shape[-1])
        order = _line_up(tables, k.shape[1])
        return Keys(
            torch.cat((k, far_k), dim=1).index_select(1, order),
            torch.cat((v, far_v), dim=1).index_select(1, order),
            tables.key_position[0, : order.numel()],
        )


def _line_up(tables: KeyTables, local: int) -> Tensor:
    return tables.line_up[: local + int(tables.counts[1].sum())]


ALL_GATHER = AttentionOp("all_gather_attention", _AllGather())


@dataclass
class AllGatherAttention(AttentionStyle):
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

    def make_tables(
        self,
        layout: SequenceLayout,
        rank: int,
        intervals: tuple[Tensor, Tensor],
        *,
        tile: int = TILE,
    ) -> tuple[Tensor, ...]:
        return all_at_once_tables(layout, rank, intervals, tile=tile)

    def received(
        self,
        layout: SequenceLayout,
        rank: int,
        intervals: tuple[Tensor, Tensor],
        shape: AttentionShape,
    ) -> Received:
        return keys_received(layout, rank, intervals, shape)
