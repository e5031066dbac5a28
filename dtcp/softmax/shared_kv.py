"""Keys gathered once for several layers: exchanged where they are made, and kept."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from dtcp.distributed.ledger import LEDGER
from dtcp.distributed.moves import NOTHING, Moved, Moves
from dtcp.distributed.ops import communicating_op
from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.softmax.api import SoftmaxParams
from dtcp.kernels.softmax.block_ranges import UNUSED
from dtcp.metadata import BatchMetadata
from dtcp.mixer import ClaimedMixer, Mixer
from dtcp.mixer_positions import check_position_ids
from dtcp.sequence.coords import Coords
from dtcp.sequence.key_intervals import Intervals, KeyIntervals
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.all_gather import AllGatherAttention
from dtcp.softmax.exchange import bring_rows, return_grads, sort_by_index
from dtcp.softmax.inputs import AttentionInputs
from dtcp.softmax.local import ATTENTION
from dtcp.softmax.metadata import KeyExchangeMetadata, LocalMetadata
from dtcp.softmax.mixer import GatherSharedKV, MaskedMixer, SoftmaxAttention
from dtcp.softmax.moves import AttentionShape, Peers
from dtcp.softmax.op import AttentionOp
from dtcp.softmax.positions import TokenPositions
from dtcp.softmax.strategy import OpContext
from dtcp.softmax.style import AttentionStyle
from dtcp.style import MixerShape

LOG = logging.getLogger("dtcp.softmax")


class ContextParallelGatherSharedKV(ClaimedMixer, GatherSharedKV):
    """A GatherSharedKV that a style has taken over."""

    def carry_out(self, x: Tensor, attn_metadata: BatchMetadata) -> Tensor:
        metadata: KeyExchangeMetadata = self.own(attn_metadata)
        line = x.flatten(0, 1)[None] if metadata.in_line else x
        out: Tensor = _gather(line, metadata.tensors(), self.groups[-1], self.wide)
        return out.view(x.shape[0], -1, *x.shape[2:])

    def position_ids(self, position_ids: Tensor, attn_metadata: BatchMetadata) -> Tensor:
        metadata: KeyExchangeMetadata = self.own(attn_metadata)
        check_position_ids(position_ids, metadata.position_ids, metadata.sees)
        rows = metadata.position_ids.shape[0]
        # On a line, what all rows require follows one another; it has as many places as rows do.
        return metadata.key_position_ids[0].reshape(rows, -1)


class AttentionToSharedKV(ClaimedMixer, SoftmaxAttention):
    """A SoftmaxAttention whose keys a GatherSharedKV has gathered; moves nothing."""

    def carry_out(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_metadata: BatchMetadata,
        *,
        sink: Tensor | None = None,
        bias: Tensor | None = None,
        slope: Tensor | None = None,
    ) -> Tensor:
        keys: KeyExchangeMetadata = self.own(attn_metadata)
        local = LocalMetadata(
            first_key=keys.first_key,
            last_key=keys.last_key,
            key_token_index=keys.key_token_index[0],
            block_ranges=keys.block_ranges[0],
            pieces=keys.pieces[0],
            query_token_index=keys.query_token_index,
            in_line=keys.in_line,
        )
        x = AttentionInputs(q, k, v, sink, bias=bias, slope=slope)
        return ATTENTION(x, local, self.softmax(q), keys_sum_grads=self.wide)


@dataclass
class SharedKVAttention(AttentionStyle):
    """Carry out a GatherSharedKV, and every SoftmaxAttention that attends to what it gathers.

    Keys cross once for all the layers that share them, and their gradients are summed on the
    rank that used them before they go home, once as well. What was gathered is kept from the
    first of these layers to the end of the backward pass: that is the price.

    Args:
        gather: how keys are brought; decides which.

    Keyword Args:
        reduce_dtype: of gradients of keys, as of AttentionStyle: with torch.float32 what is
            gathered is fp32, too, so that the layers' gradients of it are summed unrounded; in
            bf16 that doubles what is kept.
        ranks_per_node: as of AllGatherAttention.

    Traffic per rank, received: keys required from others x B * G * W elements forward, in the
    exchange; their gradients home backward. Attention itself moves nothing.
    """

    claims: ClassVar[Mapping[type[Mixer], type[ClaimedMixer]]] = {
        GatherSharedKV: ContextParallelGatherSharedKV,
        SoftmaxAttention: AttentionToSharedKV,
    }

    gather: AllGatherAttention = field(default_factory=AllGatherAttention)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_part(self.gather)
        if self.ranks_per_node and self.gather.ranks_per_node not in (0, self.ranks_per_node):
            raise ValueError(
                f"Keys are brought over the nodes of one axis, got ranks_per_node="
                f"{self.ranks_per_node} and {self.gather.ranks_per_node} in gather: give one."
            )
        # Those of the one that brings keys, where this style is given none.
        self.ranks_per_node = self.ranks_per_node or self.gather.ranks_per_node

    @property
    def op(self) -> AttentionOp:
        return ATTENTION

    def check(self, mixer: Mixer, layout: SequenceLayout) -> None:
        self.gather.check(mixer, layout)

    def check_in_graph(self, name: str) -> None:
        raise ValueError(
            f"{name} gathers the keys of its own call, got style={self}, whose keys a "
            f"GatherSharedKV of the model gathers: give it {type(self.gather).__name__}."
        )

    def make_metadata(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> KeyExchangeMetadata:
        assert isinstance(mixer, MaskedMixer)
        self.check(mixer, layout)
        metadata = self.batch_metadata(layout, rank, KeyIntervals.of(mixer.mask, coords))
        assert isinstance(metadata, KeyExchangeMetadata)
        metadata = metadata.with_position_ids(TokenPositions.of(coords), layout, rank)
        # Models rotate as many keys as there is room for.
        (count,) = metadata.key_counts
        metadata.key_position_ids[..., count:] = 0
        return metadata

    def rank_metadata(
        self, layout: SequenceLayout, rank: int, intervals: Intervals
    ) -> KeyExchangeMetadata:
        gather = replace(self.gather, ranks_per_node=self.ranks_per_node, tile=self.tile)
        metadata = gather.rank_metadata(layout, rank, intervals)
        # Kernels are called with as many keys as there is room for.
        (count,) = metadata.key_counts
        metadata.key_token_index[:, count:] = UNUSED
        return metadata

    def moves(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int, shape: MixerShape
    ) -> Moves:
        """Of the exchange; its shape has as key and value dim what a gathered row comes to."""
        assert isinstance(shape, AttentionShape)
        if not isinstance(mixer, GatherSharedKV):
            return NOTHING
        metadata = self.make_metadata(mixer, coords, layout, rank)
        batch = 1 if metadata.in_line else shape.batch
        shape = replace(shape, batch=batch, wide=self.sums_wide(layout.num_shards))
        return _shared_moves(metadata, shape, rank)


def _context(op: str, keys: KeyExchangeMetadata, x: Tensor, group: str) -> OpContext:
    return OpContext(f"dtcp::{op}", keys, SoftmaxParams(1.0), [group], x.shape[2])


def _shared_moves(metadata: KeyExchangeMetadata, shape: AttentionShape, rank: int) -> Moves:
    """Of rows of a shape; their gradients are summed in wider ones."""
    sent, received = metadata.moved.tolist()
    row, back = shape.key_row, shape.grad_row
    summed = row // shape.element_size * shape.accumulated
    held = metadata.first_key.shape[1] + sum(received)
    there = row * (sum(sent) + sum(received) + held)
    return Moves(
        Moved.rows(sent, received, row, rank, workspace=there),
        Moved.rows(received, sent, back, rank, workspace=(back + 2 * summed) * held),
    )


def _op_moves(x: Tensor, metadata: list[Tensor], group: str) -> Moves:
    """Of rows, or of their gradients, that travel in their dtype."""
    batch, _, heads, width = x.shape
    shape = AttentionShape(batch, heads, heads, width, 0, x.element_size())
    return _shared_moves(KeyExchangeMetadata.of_tensors(metadata), shape, Peers.of([group]).rank)


def _gather_moves(x: Tensor, metadata: list[Tensor], group: str, wide: bool) -> Moved:
    return _op_moves(x, metadata, group).forward


def _gather_backward_moves(grad: Tensor, metadata: list[Tensor], group: str) -> Moved:
    return _op_moves(grad, metadata, group).backward


@communicating_op("dtcp::gather_shared_kv", moves=_gather_moves)
def _gather(x: Tensor, metadata: list[Tensor], group: str, wide: bool) -> Tensor:
    """Put local and required rows in token order: [B, L, G, W] -> [B, K, G, W], zero behind.

    K is the same on every rank and for every batch.

    Args:
        wide: give them in the dtype of `accumulation`, whatever they travel in, and so take their
            gradients.
    """
    keys = KeyExchangeMetadata.of_tensors(metadata)
    LEDGER.record("dtcp::gather_shared_kv")
    slots = keys.send_slot[: int(keys.counts[0].sum())]
    rows = x.index_select(1, slots).transpose(0, 1).contiguous()
    received = bring_rows(rows, keys, _context("gather_shared_kv", keys, x, group))
    every = torch.cat((x, received.transpose(0, 1)), dim=1)
    out = _gathered_like(x, keys, wide).zero_()
    order = sort_by_index(keys, x.shape[1])
    out[:, : order.numel()] = every.index_select(1, order)
    return out


@communicating_op("dtcp::gather_shared_kv_backward", moves=_gather_backward_moves)
def _gather_backward(grad: Tensor, metadata: list[Tensor], group: str) -> Tensor:
    keys = KeyExchangeMetadata.of_tensors(metadata)
    LEDGER.record("dtcp::gather_shared_kv_backward")
    length = keys.first_key.shape[1]
    count = sort_by_index(keys, length).numel()
    if keys.counts.shape[1] > 1 and grad.dtype != accumulation(grad.dtype):
        _say_rounded()
    rows = grad[:, :count].transpose(0, 1).to(accumulation(grad.dtype))
    context = _context("gather_shared_kv_backward", keys, grad, group)
    return return_grads(rows, keys, length, grad.dtype, context).to(grad.dtype)


@cache
def _say_rounded() -> None:
    LOG.info(
        "Ranks sum gradients of keys that layers share, and each layer has rounded its own: more "
        "than the error of one device. With reduce_dtype=torch.float32 none is rounded."
    )


@_gather.register_fake
def _(x: Tensor, metadata: list[Tensor], group: str, wide: bool) -> Tensor:
    return _gathered_like(x, KeyExchangeMetadata.of_tensors(metadata), wide)


@_gather_backward.register_fake
def _(grad: Tensor, metadata: list[Tensor], group: str) -> Tensor:
    keys = KeyExchangeMetadata.of_tensors(metadata)
    return grad.new_empty((grad.shape[0], keys.first_key.shape[1], *grad.shape[2:]))


def _gathered_like(x: Tensor, keys: KeyExchangeMetadata, wide: bool) -> Tensor:
    shape = (x.shape[0], keys.key_token_index.shape[1], *x.shape[2:])
    return x.new_empty(shape, dtype=accumulation(x.dtype) if wide else x.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, metadata, ctx.group, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(*metadata)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    metadata = list(ctx.saved_tensors)
    grad_shard = _gather_backward(grad, metadata, ctx.group).to(ctx.dtype)
    return grad_shard, [None] * len(metadata), None, None


_gather.register_autograd(_differentiate, setup_context=_keep)
