"""Keys brought once for several layers: they are exchanged where they are made, and kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.ledger import LEDGER
from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.softmax.api import Softmax
from dtcp.kernels.softmax.block_ranges import TILE
from dtcp.mixer import Tables, check_position
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.masks import Coords, Mask
from dtcp.softmax.all_gather import AllGatherAttention, line_up, send_home
from dtcp.softmax.exchange import exchange
from dtcp.softmax.local import ATTENTION, LocalTables
from dtcp.softmax.mixer import KeyExchange, SoftmaxAttention
from dtcp.softmax.op import AttentionOp, Call
from dtcp.softmax.required_keys import KeyTables
from dtcp.softmax.style import AttentionStyle, ContextParallelMixer


@dataclass
class BroughtAttention(AttentionStyle):
    """Carry out a KeyExchange, and every SoftmaxAttention that attends to what it brings.

    Keys cross once for all the layers that share them, and their gradients are summed on the
    rank that used them before they go home, once as well. What was brought is kept from the
    first of these layers to the end of the backward pass: that is the price.

    Args:
        how: how keys are brought; decides which.

    Traffic per rank, received: keys needed from others x B * G * W elements forward, in the
    exchange; their gradients home backward. Attention itself moves nothing.
    """

    how: AllGatherAttention = field(default_factory=AllGatherAttention)

    @property
    def op(self) -> AttentionOp:
        return ATTENTION

    def check(self, mask: Mask, layout: SequenceLayout) -> None:
        self.how.check(mask, layout)

    def make_tables(
        self,
        layout: SequenceLayout,
        rank: int,
        intervals: tuple[Tensor, Tensor],
        *,
        tile: int = TILE,
    ) -> tuple[Tensor, ...]:
        return self.how.make_tables(layout, rank, intervals, tile=tile)

    def mixer_tables(
        self, mask: Mask, coords: Coords, layout: SequenceLayout, rank: int
    ) -> tuple[Tensor, ...]:
        """KeyTables, and the positions of queries [B, L] and of lined-up keys [1, B, K]."""
        return self.how.values_tables(mask, coords, layout, rank)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        claimed: dict[type, type[ContextParallelMixer]] = {
            KeyExchange: _Bring,
            SoftmaxAttention: _AttendToBrought,
        }
        if type(module) not in claimed:
            raise TypeError(
                f"{self} takes over an unclaimed KeyExchange or SoftmaxAttention, got a "
                f"{type(module).__name__}: name the mixer itself in the plan."
            )
        module.__class__ = claimed[type(module)]
        cast(ContextParallelMixer, module).claim(self, device_mesh)
        return module


class _Bring(ContextParallelMixer, KeyExchange):
    def key_of(self, read: str) -> str:
        return read

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        return _bring(x, list(self.own(tables)), self.groups[-1])

    def position(self, position: Tensor, tables: Tables) -> Tensor:
        *read, known, key_position = self.own(tables)
        check_position(position, known, read[1] >= read[0])
        return key_position[0]


class _AttendToBrought(ContextParallelMixer, SoftmaxAttention):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tables: Tables, *, sink: Tensor | None = None
    ) -> Tensor:
        keys = _keys(self.own(tables))
        local = LocalTables(keys.first_key, keys.last_key, keys.key_position[0], keys.spans[0])
        return ATTENTION(q, k, v, local, self.softmax(q), sink=sink)


def _keys(tables: Sequence[Tensor]) -> KeyTables:
    return KeyTables(*tables[: len(KeyTables._fields)])


def _call(op: str, tables: Sequence[Tensor], x: Tensor, group: str) -> Call:
    return Call(f"dtcp::{op}", tables, Softmax(1.0), [group], x.shape[2])


@torch.library.custom_op("dtcp::bring_keys", mutates_args=())
def _bring(x: Tensor, tables: list[Tensor], group: str) -> Tensor:
    """Line up local and needed rows by position: [B, L, G, W] -> [B, K, G, W], zero behind.

    K is the same on every rank and for every batch.
    """
    keys = _keys(tables)
    LEDGER.record("dtcp::bring_keys")
    send, receive = keys.counts.tolist()
    rows = x.index_select(1, keys.send_slot[: sum(send)]).transpose(0, 1).contiguous()
    far = exchange(rows, send, receive, _call("bring_keys", tables, x, group))
    every = torch.cat((x, far.transpose(0, 1)), dim=1)
    out = x.new_zeros((x.shape[0], keys.key_position.shape[1], *x.shape[2:]))
    order = line_up(keys, x.shape[1])
    out[:, : order.numel()] = every.index_select(1, order)
    return out


@torch.library.custom_op("dtcp::bring_keys_backward", mutates_args=())
def _bring_backward(grad: Tensor, tables: list[Tensor], group: str) -> Tensor:
    keys = _keys(tables)
    LEDGER.record("dtcp::bring_keys_backward")
    length = keys.first_key.shape[1]
    count = line_up(keys, length).numel()
    rows = grad[:, :count].transpose(0, 1).to(accumulation(grad.dtype))
    call = _call("bring_keys_backward", tables, grad, group)
    return send_home(rows, keys, length, grad.dtype, call).to(grad.dtype)


@_bring.register_fake
def _(x: Tensor, tables: list[Tensor], group: str) -> Tensor:
    return x.new_empty((x.shape[0], _keys(tables).key_position.shape[1], *x.shape[2:]))


@_bring_backward.register_fake
def _(grad: Tensor, tables: list[Tensor], group: str) -> Tensor:
    return grad.new_empty((grad.shape[0], _keys(tables).first_key.shape[1], *grad.shape[2:]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tables, ctx.group = inputs
    ctx.save_for_backward(*tables)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tables = list(ctx.saved_tensors)
    return _bring_backward(grad, tables, ctx.group), [None] * len(tables), None


_bring.register_autograd(_differentiate, setup_context=_keep)
