"""Bring every key a rank needs in one exchange, then attend once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.kernels.softmax.api import (
    Final,
    Gradients,
    Keys,
    Partial,
    Queries,
    attend,
    attend_backward,
    zeros_for,
)
from dtcp.kernels.softmax.block_ranges import TILE
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.exchange import add_home, exchange
from dtcp.softmax.op import AttentionOp, Call
from dtcp.softmax.payload import Carried, Carrier
from dtcp.softmax.required_keys import KeyTables, NeededKeysAttention, all_at_once_tables
from dtcp.softmax.values_op import ValuesOp


class _AllGather(Carrier):
    """One all_to_all out; backward brings the keys again and sends their gradients home."""

    def attend(
        self, q: Tensor, carried: Carried, sink: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor]:
        tables = KeyTables(*call.tables)
        queries = Queries.of(q, tables.first_key, tables.last_key)
        keys = self._bring(carried, q.shape[1], tables, call)
        partial = Partial.empty(q, keys.v.shape[-1])
        attend(partial, queries, keys, tables.spans[0], call.how)
        return partial.finish(sink, q.dtype)

    def attend_backward(
        self, q: Tensor, carried: Carried, final: Final, call: Call
    ) -> tuple[Tensor, Tensor]:
        tables, length = KeyTables(*call.tables), q.shape[1]
        keys = self._bring(carried, length, tables, call)
        sums, dq = carried.sums(keys.v.shape[1]), zeros_for(q)
        queries = Queries.of(q, tables.first_key, tables.last_key)
        grads = Gradients(dq, sums.dk, sums.dv)
        attend_backward(grads, final, queries, keys, tables.spans[0], call.how)

        rows = carried.close(sums, keys.v, 0).transpose(0, 1)
        return dq, send_home(rows, tables, length, q.dtype, call)

    def _bring(self, carried: Carried, length: int, tables: KeyTables, call: Call) -> Keys:
        """Local and needed keys, by ascending position."""
        send, receive = tables.counts.tolist()
        rows = exchange(carried.pack(tables.send_slot[: sum(send)]), send, receive, call)
        order = line_up(tables, length)
        k, v = carried.lined_up(rows, order)
        return Keys(k, v, tables.key_position[0, : order.numel()])


def line_up(tables: KeyTables, local: int) -> Tensor:
    """Where each lined-up key comes from: the local ones, then those that arrive."""
    return tables.line_up[: local + int(tables.counts[1].sum())]


def send_home(
    rows: Tensor, tables: KeyTables, length: int, dtype: torch.dtype, call: Call
) -> Tensor:
    """Gradients of lined-up rows [K, B, G, W], summed where the rows came from: [B, L, G, W]."""
    arrival = torch.empty_like(rows).index_copy_(0, line_up(tables, length).long(), rows)
    here = arrival[:length].transpose(0, 1).contiguous()
    send, receive = tables.counts.tolist()
    home = exchange(arrival[length:].to(dtype), receive, send, call)
    add_home(here, home, tables.send_slot[: sum(send)])
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

    def make_tables(
        self,
        layout: SequenceLayout,
        rank: int,
        intervals: tuple[Tensor, Tensor],
        *,
        tile: int = TILE,
    ) -> tuple[Tensor, ...]:
        return all_at_once_tables(layout, rank, intervals, tile=tile)
