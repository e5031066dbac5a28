"""Keys brought once for several layers: they are exchanged where they are made, and kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.ledger import LEDGER
from dtcp.distributed.ops import communicating_op
from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.softmax.api import SoftmaxParams
from dtcp.kernels.softmax.block_ranges import TILE
from dtcp.mixer import BatchMetadata, check_position_ids
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.masks import Coords, Mask
from dtcp.softmax.all_gather import AllGatherAttention, return_grads, sort_by_index
from dtcp.softmax.exchange import all_to_all_rows
from dtcp.softmax.local import ATTENTION, LocalMetadata
from dtcp.softmax.mixer import KeyExchange, SoftmaxAttention
from dtcp.softmax.op import AttentionOp, OpContext
from dtcp.softmax.required_keys import KeyExchangeMetadata
from dtcp.softmax.style import AttentionStyle, ContextParallelMixer


@dataclass
class SharedKVAttention(AttentionStyle):
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

    def make_metadata(
        self,
        layout: SequenceLayout,
        rank: int,
        intervals: tuple[Tensor, Tensor],
        *,
        tile: int = TILE,
    ) -> tuple[Tensor, ...]:
        return self.how.make_metadata(layout, rank, intervals, tile=tile)

    def collect_metadata(
        self, mask: Mask, coords: Coords, layout: SequenceLayout, rank: int
    ) -> tuple[Tensor, ...]:
        """KeyExchangeMetadata, and position_ids of queries [B, L] and of keys [1, B, K]."""
        return self.how.value_only_metadata(mask, coords, layout, rank)

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

    def forward(self, x: Tensor, metadata: BatchMetadata) -> Tensor:
        return _bring(x, list(self.own(metadata)), self.groups[-1])

    def position_ids(self, position_ids: Tensor, metadata: BatchMetadata) -> Tensor:
        *read, known, key_token_index = self.own(metadata)
        check_position_ids(position_ids, known, read[1] >= read[0])
        return key_token_index[0]


class _AttendToBrought(ContextParallelMixer, SoftmaxAttention):
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        metadata: BatchMetadata,
        *,
        sink: Tensor | None = None,
    ) -> Tensor:
        keys = _keys(self.own(metadata))
        local = LocalMetadata(keys.first_key, keys.last_key, keys.key_token_index[0], keys.spans[0])
        return ATTENTION(q, k, v, local, self.softmax(q), sink=sink)


def _keys(metadata: Sequence[Tensor]) -> KeyExchangeMetadata:
    return KeyExchangeMetadata(*metadata[: len(KeyExchangeMetadata._fields)])


def _call(op: str, metadata: Sequence[Tensor], x: Tensor, group: str) -> OpContext:
    return OpContext(f"dtcp::{op}", metadata, SoftmaxParams(1.0), [group], x.shape[2])


@communicating_op("dtcp::gather_shared_kv")
def _bring(x: Tensor, metadata: list[Tensor], group: str) -> Tensor:
    """Line up local and needed rows by position: [B, L, G, W] -> [B, K, G, W], zero behind.

    K is the same on every rank and for every batch.
    """
    keys = _keys(metadata)
    LEDGER.record("dtcp::gather_shared_kv")
    send, receive = keys.counts.tolist()
    rows = x.index_select(1, keys.send_slot[: sum(send)]).transpose(0, 1).contiguous()
    far = all_to_all_rows(rows, send, receive, _call("gather_shared_kv", metadata, x, group))
    every = torch.cat((x, far.transpose(0, 1)), dim=1)
    out = x.new_zeros((x.shape[0], keys.key_token_index.shape[1], *x.shape[2:]))
    order = sort_by_index(keys, x.shape[1])
    out[:, : order.numel()] = every.index_select(1, order)
    return out


@communicating_op("dtcp::bring_keys_backward")
def _bring_backward(grad: Tensor, metadata: list[Tensor], group: str) -> Tensor:
    keys = _keys(metadata)
    LEDGER.record("dtcp::bring_keys_backward")
    length = keys.first_key.shape[1]
    count = sort_by_index(keys, length).numel()
    rows = grad[:, :count].transpose(0, 1).to(accumulation(grad.dtype))
    call = _call("bring_keys_backward", metadata, grad, group)
    return return_grads(rows, keys, length, grad.dtype, call).to(grad.dtype)


@_bring.register_fake
def _(x: Tensor, metadata: list[Tensor], group: str) -> Tensor:
    return x.new_empty((x.shape[0], _keys(metadata).key_token_index.shape[1], *x.shape[2:]))


@_bring_backward.register_fake
def _(grad: Tensor, metadata: list[Tensor], group: str) -> Tensor:
    return grad.new_empty((grad.shape[0], _keys(metadata).first_key.shape[1], *grad.shape[2:]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, metadata, ctx.group = inputs
    ctx.save_for_backward(*metadata)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    metadata = list(ctx.saved_tensors)
    return _bring_backward(grad, metadata, ctx.group), [None] * len(metadata), None


_bring.register_autograd(_differentiate, setup_context=_keep)
