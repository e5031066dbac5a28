"""Trade heads for sequence: each rank attends with some of the heads to the whole sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dtcp.distributed.groups import group_of
from dtcp.distributed.moves import Moved, Moves
from dtcp.distributed.staging import exchange
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.exchange import all_to_all_rows
from dtcp.softmax.head_share import HeadShare
from dtcp.softmax.inputs import AttentionInputs, check_key_count
from dtcp.softmax.joined_shards import UlyssesMetadata, ulysses_metadata
from dtcp.softmax.kv_head_replicas import KVHeadReplicas
from dtcp.softmax.local import LOCAL
from dtcp.softmax.metadata import KeyExchangeMetadata, local_metadata
from dtcp.softmax.moves import AttentionShape, Peers, heads_moved
from dtcp.softmax.op import AttentionOp
from dtcp.softmax.replicated_head_exchange import ReplicatedHeadExchange
from dtcp.softmax.row_transfers import MoveRows
from dtcp.softmax.strategy import ForwardResult, OpContext, Strategy
from dtcp.softmax.style import AttentionStyle


class Ulysses:
    """all_to_all to heads, another strategy on them (attending locally, or a ring), and back.

    Keeps q, k, v and out by heads: bringing them again would cost what forward cost.
    """

    keeps_own_form = True
    takes_latents = False

    def __init__(self, outer: Strategy) -> None:
        self.outer, self.takes_values_only = outer, outer.takes_values_only

    def metadata_of(self, tensors: Sequence[Tensor]) -> UlyssesMetadata:
        return UlyssesMetadata.around(self.outer.metadata_of, tensors)

    def forward(self, x: AttentionInputs, context: OpContext) -> ForwardResult:
        metadata: UlyssesMetadata = context.metadata
        share = _share(x.q.shape[2], context)
        check_key_count(x, metadata.num_keys // share.num_ranks or x.q.shape[1])
        q, *k, v = self._to_sequence(x, share, context)
        own = _by_heads(x._replace(q=q, k=k[0] if k else None, v=v), share, context)
        out, saved = self.outer.forward(own, self._outer_context(context, share))
        (local,) = _to_heads((out,), metadata.restore, context)
        # In the place of keys that are not there, those of no token.
        kept = k[0] if k else v.new_empty(v.shape[0], 0, *v.shape[2:])
        return ForwardResult(share.join(local), [q, kept, v, out, *saved])

    def backward(
        self, grad_out: Tensor, x: AttentionInputs, result: ForwardResult, context: OpContext
    ) -> AttentionInputs:
        metadata: UlyssesMetadata = context.metadata
        share = _share(grad_out.shape[2], context)
        (grad,) = _to_sequence((share.split(grad_out),), metadata.order, context)
        own = _by_heads(x, share, context)
        grads = self.outer.backward(grad, own, result, self._outer_context(context, share))
        dq, *dk, dv = self._to_heads(grads, x.q.dtype, share, context)
        dq, rest = _apart(dq, grads)
        rest |= {"key_scale": grads.key_scale, "profiles": grads.profiles}
        for name in x.per_head:
            rest[name], part = torch.zeros_like(getattr(x, name)), getattr(grads, name)
            if part is not None:
                rest[name][_own_heads(share, context.groups)] = part
        # Key scale and profiles are of all heads: this rank's share, as of its queries elsewhere.
        gradients = (dq, dk[0] if dk else None, dv)
        return AttentionInputs(*gradients, **rest)

    def saved_like(
        self, x: AttentionInputs, metadata: UlyssesMetadata, group_sizes: Sequence[int]
    ) -> list[Tensor]:
        q, v = x.q, x.v
        k = v[:, :0] if x.k is None else x.k
        share = HeadShare(q.shape[2], v.shape[2], _inner_of(group_sizes))
        batch, length = q.shape[:2]
        whole = (batch, length * share.num_ranks)
        width = q.shape[-1] + sum(each.shape[-1] for each in x.beside_queries)
        inner_q = q.new_empty(*whole, share.heads // share.num_ranks, width)
        keys = (batch, k.shape[1] * share.num_ranks, share.kv_heads_each)
        inner_k = k.new_empty(*keys, k.shape[-1])
        inner_v = v.new_empty(batch, v.shape[1] * share.num_ranks, *inner_k.shape[2:3], v.shape[-1])
        out = q.new_empty(*inner_q.shape[:-1], v.shape[-1])
        inner = AttentionInputs(inner_q, inner_k, inner_v)
        rest = self.outer.saved_like(inner, metadata.outer, group_sizes)
        return [inner_q, inner_k, inner_v, out, *rest]

    def moves(
        self, shape: AttentionShape, length: int, metadata: UlyssesMetadata, peers: Peers
    ) -> Moves:
        u = peers.group_size
        kv_heads = max(shape.kv_heads // u, 1)
        each = replace(shape, heads=shape.heads // u, kv_heads=kv_heads)
        outer: Any = metadata.outer
        keys, per_node = metadata.num_keys // u, metadata.neighbours
        within = heads_moved(shape, length, u, peers.rank % u, keys=keys, per_node=per_node)
        between = self.outer.moves(each, u * length, outer, peers.between())
        replicas = KVHeadReplicas.of(u, peers.rank % u, per_node, max(u // shape.kv_heads, 1))
        if replicas is not None and u < peers.num_ranks:
            between, inside = self._shared(replicas, each, u * length, outer, peers)
            within += inside
        return Moves(
            peers.placed_within(within.forward) + peers.placed_between(between.forward),
            peers.placed_within(within.backward) + peers.placed_between(between.backward),
        )

    def _shared(
        self,
        replicas: KVHeadReplicas,
        shape: AttentionShape,
        length: int,
        keys: KeyExchangeMetadata,
        peers: Peers,
    ) -> tuple[Moves, Moves]:
        """What goes between groups if replicas fetch a part each, and what they gather inside."""
        sent, received = keys.counts.tolist()
        parts = replace(keys, counts=torch.tensor([replicas.shares(x) for x in (sent, received)]))
        between = self.outer.moves(shape, length, parts, peers.between())
        out, back = replicas.inside(received)
        there = Moved.rows(out, back, shape.key_row, replicas.rank)
        home = Moved.rows(back, out, shape.grad_row, replicas.rank)
        return between, Moves(there, there + home)

    def _to_sequence(
        self, x: AttentionInputs, share: HeadShare, context: OpContext
    ) -> list[Tensor]:
        """q, k and v, or q and v, of this rank's heads and all tokens: [B, n * L, heads, D]."""
        metadata: UlyssesMetadata = context.metadata
        q = share.split(_beside(x.q, x.beside_queries))
        keys = [y for y in (x.k, x.v) if y is not None]
        if (replicated := _replicated(share, context)) is not None:
            parts = replicated.to_sequence(keys, _mover(context))
            whole = [_ordered(y.movedim(0, 1).flatten(1, 2), metadata.order_of_keys) for y in parts]
            whole = [y.contiguous() for y in whole]
            return [*_to_sequence([q], metadata.order, context), *whole]
        of_keys = [share.split_kv(y) for y in keys]
        if not metadata.num_keys:
            return _to_sequence([q, *of_keys], metadata.order, context)
        (q,) = _to_sequence([q], metadata.order, context)
        return [q, *_to_sequence(of_keys, metadata.order_of_keys, context)]

    def _to_heads(
        self, grads: AttentionInputs, dtype: torch.dtype, share: HeadShare, context: OpContext
    ) -> list[Tensor]:
        """The gradients of `_to_sequence`, travelling in a dtype, of all heads and local tokens.

        Those of kv heads that are replicated, which are summed at home, in that of the context.
        """
        metadata: UlyssesMetadata = context.metadata
        q, *keys = [y for y in grads[:3] if y is not None]
        q = _beside(q, grads.beside_queries)
        of_keys_dtype = context.grad_dtype(dtype) if share.replicas > 1 else dtype
        if (replicated := _replicated(share, context)) is not None:
            n = share.num_ranks
            (dq,) = _to_heads([q.to(dtype)], metadata.restore, context)
            parts = [_ordered(y, metadata.restore_of_keys).unflatten(1, (n, -1)) for y in keys]
            parts = [y.movedim(1, 0) for y in parts]
            home = replicated.home(parts, share.kv_heads, of_keys_dtype, _mover(context))
            return [share.join(dq), *home]
        q, *keys = q.to(dtype), *(y.to(of_keys_dtype) for y in keys)
        if not metadata.num_keys and of_keys_dtype == dtype:
            dq, *of_keys = _to_heads([q, *keys], metadata.restore, context)
        else:
            (dq,) = _to_heads([q], metadata.restore, context)
            of_keys = _to_heads(keys, metadata.restore_of_keys, context)
        return [share.join(dq), *(share.join_kv_gradient(y) for y in of_keys)]

    def _outer_context(self, context: OpContext, share: HeadShare) -> OpContext:
        """The context of the strategy inside."""
        between = [dist.get_world_size(group_of(name)) for name in context.groups[2:]]
        # Gradients are summed inside where ranks share a kv head, and between groups by `outer`.
        summed = max([share.replicas, *between]) > 1
        return replace(
            context,
            metadata=context.metadata.outer,
            softmax=replace(context.softmax, wide=context.softmax.wide and summed),
            kv_heads=share.kv_heads_each,
            replicas=_replicas(share, context) if len(context.groups) > 1 else None,
            shares_kv_heads=share.replicas > 1,
        )


T = TypeVar("T")


def _inner_of(groups: Sequence[T]) -> T:
    """Names or sizes are those of (axis,), or of (axis, inner, outer) where it is split in two."""
    return groups[1] if len(groups) > 1 else groups[0]


def _inner_group(groups: Sequence[str]) -> dist.ProcessGroup:
    return group_of(_inner_of(groups))


def _share(heads: int, context: OpContext) -> HeadShare:
    num_ranks = dist.get_world_size(_inner_group(context.groups))
    return HeadShare(heads, context.kv_heads, num_ranks)


def _replicated(share: HeadShare, context: OpContext) -> ReplicatedHeadExchange | None:
    rank = dist.get_rank(_inner_group(context.groups))
    per_node = context.metadata.neighbours
    return ReplicatedHeadExchange.of(share.num_ranks, rank, per_node, share.replicas)


def _replicas(share: HeadShare, context: OpContext) -> KVHeadReplicas | None:
    rank = dist.get_rank(_inner_group(context.groups))
    per_node = context.metadata.neighbours
    return KVHeadReplicas.of(share.num_ranks, rank, per_node, share.replicas)


def _mover(context: OpContext) -> MoveRows:
    """all_to_alls of rows among the ranks that deal heads out."""
    inner = replace(context, groups=[_inner_of(context.groups)])
    return lambda rows, send, receive: all_to_all_rows(rows, send, receive, inner)


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    return x if order.numel() == 0 else x.index_select(1, order)


def _own_heads(share: HeadShare, groups: Sequence[str]) -> slice:
    rank, each = dist.get_rank(_inner_group(groups)), share.heads // share.num_ranks
    return slice(rank * each, (rank + 1) * each)


def _by_heads(x: AttentionInputs, share: HeadShare, context: OpContext) -> AttentionInputs:
    """The inputs of this rank's heads, of those whose q, k and v are by heads."""
    heads, (q, of_tokens) = _own_heads(share, context.groups), _apart(x.q, x)
    own: dict[str, Any] = {name: getattr(x, name)[heads] for name in x.per_head}
    return x._replace(q=q, **of_tokens, **own)


def _beside(q: Tensor, channels: Sequence[Tensor]) -> Tensor:
    """Queries with what travels beside them."""
    return torch.cat((q, *(x.to(q.dtype) for x in channels)), dim=-1) if channels else q


def _apart(q: Tensor, x: AttentionInputs) -> tuple[Tensor, dict[str, Any]]:
    """Queries, and what came beside them; x says of how many channels."""
    widths = [each.shape[-1] for each in x.beside_queries]
    q, *beside = q.split([q.shape[-1] - sum(widths), *widths], dim=-1)
    of_tokens = {}
    if x.has_own_sinks:
        of_tokens["sink"] = beside.pop()[..., 0]
    if beside:
        of_tokens["relative"] = beside.pop()
    return q, of_tokens


def _to_sequence(parts: Sequence[Tensor], order: Tensor, context: OpContext) -> list[Tensor]:
    """One all_to_all: [n, B, L, heads, D] by receiver -> [B, n * L, heads, D] by position."""
    n, batch, length = parts[0].shape[:3]
    if order.numel() not in (0, n * length):
        raise ValueError(
            f"Attention reads the metadata of its own batch, got some for {order.numel()} tokens "
            f"on {n} ranks with {length} each: pass those made with this batch, and q, k and v as "
            f"[B, L, H, D]."
        )
    rows = _all_to_all(torch.cat([x.flatten(3) for x in parts], dim=-1), context)
    whole = rows.movedim(0, 1).reshape(batch, n * length, -1)
    whole = _ordered(whole, order)
    widths = [x.shape[3:].numel() for x in parts]
    split = whole.split(widths, dim=-1)
    return [x.unflatten(2, p.shape[3:]).contiguous() for x, p in zip(split, parts, strict=True)]


def _to_heads(parts: Sequence[Tensor], restore: Tensor, context: OpContext) -> list[Tensor]:
    """The way back: [B, n * L, heads, D] by position -> [n, B, L, heads, D] by owner of heads."""
    n = dist.get_world_size(_inner_group(context.groups))
    whole = torch.cat([x.flatten(2) for x in parts], dim=-1)
    whole = _ordered(whole, restore)
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
    each = [rows[0].nbytes] * n
    context.count(_inner_of(context.groups), each, each)
    return out


ULYSSES = AttentionOp("ulysses_attention", Ulysses(LOCAL), communicates=True)


@dataclass
class UlyssesAttention(AttentionStyle):
    """Attention in which each rank holds the whole sequence for its share of the heads.

    Balanced in every layout. Ranks divide the heads; kv heads divide the ranks or are divided
    by them, and are then replicated to the ranks that share one.

    Keyword Args:
        boundary: InGraph() or EagerIsland().
        reduce_dtype: of gradients of kv heads that are replicated, as of AttentionStyle.
        ranks_per_node: neighbours that share a node. Every rank gets heads of its own, but for kv
            heads that are replicated: these cross once to each node, and are spread inside.

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
        self, layout: SequenceLayout, rank: int, intervals: KeyIntervals
    ) -> UlyssesMetadata:
        keys = intervals.keys
        num_keys = None if keys is None else keys.seq_len
        local = local_metadata(intervals, num_keys=num_keys, tile=self.tile)
        nodes = self.ranks_per_node
        return ulysses_metadata(layout, keys, local, num_shards=1, shard=0, ranks_per_node=nodes)
