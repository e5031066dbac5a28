"""Trade heads for sequence: each rank attends with some of the heads to the whole sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dtcp.distributed.groups import group_of
from dtcp.distributed.moves import Moves
from dtcp.distributed.staging import exchange
from dtcp.kernels.dtypes import accumulation
from dtcp.metadata import AttentionMetadata
from dtcp.sequence.interval_runs import Intervals, KeyIntervals
from dtcp.sequence.layout import Contiguous, SequenceLayout
from dtcp.sequence.partition import Partition
from dtcp.softmax.inputs import check_key_count
from dtcp.softmax.local import LOCAL
from dtcp.softmax.metadata import local_metadata
from dtcp.softmax.moves import AttentionShape, Peers, heads_moved
from dtcp.softmax.op import (
    AttentionInputs,
    AttentionOp,
    ForwardResult,
    OpContext,
    Strategy,
)
from dtcp.softmax.style import AttentionStyle


@dataclass(frozen=True)
class HeadShare:
    """Which heads each of n ranks attends with: equal parts, kv heads copied where G < n."""

    heads: int
    kv_heads: int
    num_ranks: int

    def __post_init__(self) -> None:
        n, kv = self.num_ranks, self.kv_heads
        if self.heads % n or (kv % n and n % kv):
            raise ValueError(
                f"Ulysses deals out whole heads, so ranks divide heads, and kv heads divide ranks "
                f"or the other way round, got heads={self.heads}, kv_heads={kv}, ranks={n}: use "
                f"fewer ranks for it (HybridAttention), or RingAttention."
            )

    @property
    def copies(self) -> int:
        """Ranks that share one kv head."""
        return max(self.num_ranks // self.kv_heads, 1)

    @property
    def kv_heads_each(self) -> int:
        """Kv heads a rank attends with."""
        return max(self.kv_heads // self.num_ranks, 1)

    def split(self, x: Tensor) -> Tensor:
        """Query heads by rank: [B, L, H, D] -> [n, B, L, H / n, D]."""
        return x.unflatten(2, (self.num_ranks, -1)).movedim(2, 0)

    def split_kv(self, x: Tensor) -> Tensor:
        """Kv heads by rank: [B, L, G, D] -> [n, B, L, max(G, n) / n, D]."""
        return self.split(x.repeat_interleave(self.copies, dim=2))

    def join(self, x: Tensor) -> Tensor:
        """Inverse of split."""
        return x.movedim(0, 2).flatten(2, 3)

    def join_kv_gradient(self, x: Tensor) -> Tensor:
        """Gradient of split_kv: what the ranks sharing a kv head found is summed, in fp32."""
        copied = self.join(x.to(accumulation(x.dtype)))
        return copied.unflatten(2, (self.kv_heads, self.copies)).sum(3)


PER_HEAD = ("sink", "bias", "slope")
"""The inputs of attention, beside q, k and v, that have a row for each head."""


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.int32)


@dataclass(frozen=True, eq=False)
class UlyssesMetadata(AttentionMetadata):
    """What Ulysses reads of a batch, around what the strategy inside reads."""

    order: Tensor  # [n L] int32, joined slots in token order; empty where they are in order
    restore: Tensor  # [n L] int32, the way back; likewise
    outer: AttentionMetadata
    # Of keys of another sequence, [n L]; empty where keys are the queries' own.
    key_order: Tensor = field(default_factory=_none)
    key_restore: Tensor = field(default_factory=_none)
    # For keys that are made from values: of this rank's own tokens.
    position_ids: Tensor = field(default_factory=_none)  # [B, L] int32
    sees: Tensor = field(default_factory=_none)  # [B, L] bool, which queries see any key


LAST_FIELDS = 4
"""Fields of UlyssesMetadata behind those of what the strategy inside reads."""


class _Orders(NamedTuple):
    """How the slots of a group are put into the order of the row, and back."""

    order: Tensor
    restore: Tensor
    key_order: Tensor
    key_restore: Tensor

    @property
    def apart(self) -> bool:
        """Whether keys are of another sequence, and travel by themselves."""
        return self.key_order.numel() > 0


class Ulysses:
    """all_to_all to heads, another strategy on them (attending locally, or a ring), and back.

    Keeps q, k, v and out by heads: bringing them again would cost what forward cost.
    """

    keeps_own_form = True
    takes_latents = False

    def __init__(self, outer: Strategy) -> None:
        self.outer, self.takes_values_only = outer, outer.takes_values_only

    def forward(self, x: AttentionInputs, context: OpContext) -> ForwardResult:
        share = _share(x.q.shape[2], context)
        orders, outer_context = self._parts(context, share)
        by_rank = [share.split(x.q), *(share.split_kv(y) for y in (x.k, x.v) if y is not None)]
        k: Tensor | None
        if x.k is None:
            check_key_count(x, x.q.shape[1])
            q, v = _to_sequence(by_rank, orders.order, context)
            k = None
        elif orders.apart:
            check_key_count(x, orders.key_order.numel() // share.num_ranks)
            (q,) = _to_sequence(by_rank[:1], orders.order, context)
            k, v = _to_sequence(by_rank[1:], orders.key_order, context)
        else:
            check_key_count(x, x.q.shape[1])
            q, k, v = _to_sequence(by_rank, orders.order, context)
        own = AttentionInputs(q, k, v, **_of_own_heads(x, share, context))
        out, saved = self.outer.forward(own, outer_context)
        (local,) = _to_heads((out,), orders.restore, context)
        # In the place of keys that are not there, those of no token.
        kept = v.new_empty(v.shape[0], 0, *v.shape[2:]) if k is None else k
        return ForwardResult(share.join(local), [q, kept, v, out, *saved])

    def backward(
        self, grad_out: Tensor, x: AttentionInputs, result: ForwardResult, context: OpContext
    ) -> AttentionInputs:
        share = _share(grad_out.shape[2], context)
        orders, outer_context = self._parts(context, share)
        (grad,) = _to_sequence((share.split(grad_out),), orders.order, context)
        own = AttentionInputs(*x[:3], **_of_own_heads(x, share, context))
        grads = self.outer.backward(grad, own, result, outer_context)
        by_heads = [each.to(x.q.dtype) for each in grads[:3] if each is not None]
        dk: Tensor | None
        if x.k is None:
            dq, dv = _to_heads(by_heads, orders.restore, context)
            dk = None
        elif orders.apart:
            (dq,) = _to_heads(by_heads[:1], orders.restore, context)
            dk, dv = _to_heads(by_heads[1:], orders.key_restore, context)
        else:
            dq, dk, dv = _to_heads(by_heads, orders.restore, context)
        per_head: dict[str, Any] = {}
        for name in PER_HEAD:
            whole, part = getattr(x, name), getattr(grads, name)
            per_head[name] = None if whole is None else torch.zeros_like(whole)
            if whole is not None and part is not None:
                per_head[name][_own_heads(share, context.groups)] = part
        dk = None if dk is None else share.join_kv_gradient(dk)
        dv = share.join_kv_gradient(dv)
        # The scale of keys is that of all heads: this rank's share, as of its queries elsewhere.
        return AttentionInputs(share.join(dq), dk, dv, key_scale=grads.key_scale, **per_head)

    def saved_like(
        self, x: AttentionInputs, metadata: Sequence[Tensor], groups: Sequence[str]
    ) -> list[Tensor]:
        q, v = x.q, x.v
        k = v[:, :0] if x.k is None else x.k
        share = HeadShare(q.shape[2], v.shape[2], dist.get_world_size(_inner_group(groups)))
        batch, length = q.shape[:2]
        whole = (batch, length * share.num_ranks)
        inner_q = q.new_empty(*whole, share.heads // share.num_ranks, q.shape[-1])
        keys = (batch, k.shape[1] * share.num_ranks, share.kv_heads_each)
        inner_k = k.new_empty(*keys, k.shape[-1])
        inner_v = v.new_empty(batch, v.shape[1] * share.num_ranks, *inner_k.shape[2:3], v.shape[-1])
        out = q.new_empty(*inner_q.shape[:-1], v.shape[-1])
        inner = AttentionInputs(inner_q, inner_k, inner_v)
        rest = self.outer.saved_like(inner, metadata[2:-LAST_FIELDS], groups)
        return [inner_q, inner_k, inner_v, out, *rest]

    def moves(
        self, shape: AttentionShape, length: int, metadata: Sequence[Tensor], peers: Peers
    ) -> Moves:
        u = peers.group_size
        kv_heads = max(shape.kv_heads // u, 1)
        each = replace(shape, heads=shape.heads // u, kv_heads=kv_heads)
        within = heads_moved(
            shape, length, u, peers.rank % u, keys=metadata[1 - LAST_FIELDS].numel() // u
        )
        between = self.outer.moves(each, u * length, metadata[2:-LAST_FIELDS], peers.between())
        return Moves(
            peers.placed_within(within.forward) + peers.placed_between(between.forward),
            peers.placed_within(within.backward) + peers.placed_between(between.backward),
        )

    def _parts(self, context: OpContext, share: HeadShare) -> tuple[_Orders, OpContext]:
        order, restore, *outer = context.metadata[:-LAST_FIELDS]
        key_order, key_restore = context.metadata[-LAST_FIELDS:][:2]
        inside = replace(context, metadata=outer, kv_heads=share.kv_heads_each)
        return _Orders(order, restore, key_order, key_restore), inside


def _inner_name(groups: Sequence[str]) -> str:
    """groups is (axis,), or (axis, inner, outer) where the axis is split in two."""
    return groups[1] if len(groups) > 1 else groups[0]


def _inner_group(groups: Sequence[str]) -> dist.ProcessGroup:
    return group_of(_inner_name(groups))


def _share(heads: int, context: OpContext) -> HeadShare:
    num_ranks = dist.get_world_size(_inner_group(context.groups))
    return HeadShare(heads, context.kv_heads, num_ranks)


def _own_heads(share: HeadShare, groups: Sequence[str]) -> slice:
    rank, each = dist.get_rank(_inner_group(groups)), share.heads // share.num_ranks
    return slice(rank * each, (rank + 1) * each)


def _of_own_heads(x: AttentionInputs, share: HeadShare, context: OpContext) -> dict[str, Any]:
    """Of each input that has a row per head, those of this rank's heads."""
    heads = _own_heads(share, context.groups)
    each = {name: getattr(x, name) for name in PER_HEAD}
    of_all = {"key_scale": x.key_scale, "frequency": x.frequency}
    return of_all | {name: None if y is None else y[heads] for name, y in each.items()}


def _to_sequence(parts: Sequence[Tensor], order: Tensor, context: OpContext) -> list[Tensor]:
    """One all_to_all: [n, B, L, heads, D] by receiver -> [B, n * L, heads, D] by position."""
    n, batch, length = parts[0].shape[:3]
    if order.numel() not in (0, n * length):
        raise ValueError(
            f"Attention reads the metadata of its own batch, got some for {order.numel()} tokens "
            f"on {n} ranks with {length} each: pass those made with this batch."
        )
    rows = _all_to_all(torch.cat([x.flatten(3) for x in parts], dim=-1), context)
    whole = rows.movedim(0, 1).reshape(batch, n * length, -1)
    whole = whole if order.numel() == 0 else whole.index_select(1, order)
    widths = [x.shape[3:].numel() for x in parts]
    split = whole.split(widths, dim=-1)
    return [x.unflatten(2, p.shape[3:]).contiguous() for x, p in zip(split, parts, strict=True)]


def _to_heads(parts: Sequence[Tensor], restore: Tensor, context: OpContext) -> list[Tensor]:
    """The way back: [B, n * L, heads, D] by position -> [n, B, L, heads, D] by owner of heads."""
    n = dist.get_world_size(_inner_group(context.groups))
    whole = torch.cat([x.flatten(2) for x in parts], dim=-1)
    whole = whole if restore.numel() == 0 else whole.index_select(1, restore)
    rows = _all_to_all(whole.unflatten(1, (n, -1)).movedim(1, 0), context)
    split = rows.split([x.shape[2:].numel() for x in parts], dim=-1)
    return [x.unflatten(3, p.shape[2:]) for x, p in zip(split, parts, strict=True)]


def _all_to_all(rows: Tensor, context: OpContext) -> Tensor:
    """Row i of [n, ...] goes to rank i; equal sizes."""
    rows = rows.contiguous()
    n = rows.shape[0]
    if n == 1:
        return rows
    out = torch.empty_like(rows)
    exchange(out.view(-1), rows.view(-1), _inner_group(context.groups))
    each = [rows[0].numel() * rows.element_size()] * n
    context.count(_inner_name(context.groups), each, each)
    return out


@dataclass(frozen=True)
class Ascending(SequenceLayout):
    """What groups of neighbouring ranks of another layout hold together, in ascending order."""

    of: SequenceLayout = field(kw_only=True)

    def runs(self, rank: int) -> list[tuple[int, int]]:
        return self.partition.runs(rank)

    @cached_property
    def partition(self) -> Partition:
        each, of = self.of.num_shards // self.num_shards, self.of.partition
        return Partition.ascending(of.start, of.owner // each, self.seq_len)


def joined(layout: SequenceLayout, num_shards: int) -> SequenceLayout:
    """What `num_shards` groups of neighbouring ranks hold together, in ascending order."""
    return Ascending(layout.seq_len, num_shards, of=layout)


def reorder_indices(layout: SequenceLayout, num_shards: int, shard: int) -> tuple[Tensor, Tensor]:
    """Slots of a joined shard in ascending position, and the way back; empty if they ascend.

    Whether they do is a matter of the kind of layout: the graph is the same for every batch.
    """
    held = layout.permutation().view(num_shards, -1)
    if num_shards == layout.num_shards or isinstance(layout, Contiguous):
        nothing = torch.zeros(0, dtype=torch.int32)
        return nothing, nothing.clone()
    order = held[shard].argsort()
    return order.to(torch.int32), order.argsort().to(torch.int32)


def ulysses_metadata(
    layout: SequenceLayout,
    keys: SequenceLayout | None,
    outer: AttentionMetadata,
    *,
    num_shards: int,
    shard: int,
) -> UlyssesMetadata:
    """Of one of `num_shards` groups of ranks.

    Args:
        keys: the layout of the keys' sequence, where that is another one.
        outer: what the strategy between the groups reads.
    """
    own = reorder_indices(layout, num_shards, shard)
    if keys is None:
        return UlyssesMetadata(*own, outer)
    order = keys.permutation().view(num_shards, -1)[shard].argsort()
    apart = order.to(torch.int32), order.argsort().to(torch.int32)
    return UlyssesMetadata(*own, outer, *apart)


ULYSSES = AttentionOp("ulysses_attention", Ulysses(LOCAL), communicates=True)


@dataclass
class UlyssesAttention(AttentionStyle):
    """Attention in which each rank holds the whole sequence for its share of the heads.

    Balanced in every layout. Ranks divide the heads; kv heads divide the ranks or are divided
    by them, and are then copied to the ranks that share one.

    Keyword Args:
        boundary: InGraph() or EagerIsland().
        ranks_per_node: neighbours that share a node, for `received` to tell what crosses between:
            one tier, since every rank gets heads of its own (HybridAttention deals them out
            inside a node).

    Traffic per rank, received: (n - 1) / n * L * (2 H + 2 max(G, n)) * D elements for equal key
    and value dims, forward, and the same backward; L of the keys' sequence for keys and values,
    where that is another one. Kept for backward: q, k, v and out by heads,
    as large as by sequence (k and v max(G, n) / G times).
    From Jacobs et al. 2023, DeepSpeed Ulysses, section 3, https://arxiv.org/abs/2309.14509
    """

    takes_memory = True

    @property
    def op(self) -> AttentionOp:
        return ULYSSES

    def rank_metadata(
        self, layout: SequenceLayout, rank: int, intervals: Intervals
    ) -> UlyssesMetadata:
        intervals = KeyIntervals.read_off(intervals)
        keys = intervals.keys
        num_keys = None if keys is None else keys.seq_len
        local = local_metadata(intervals, num_keys=num_keys, tile=self.tile)
        return ulysses_metadata(layout, keys, local, num_shards=1, shard=0)
