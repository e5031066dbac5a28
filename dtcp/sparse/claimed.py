"""What compressed sparse attention becomes once a style has taken it over."""

from typing import Any

import torch
from torch import Tensor

from dtcp.distributed.node_collectives import all_gather_on_nodes
from dtcp.distributed.relayout import apply_relayout
from dtcp.kernels.sparse.pooling import Prepool
from dtcp.metadata import BatchMetadata
from dtcp.mixer import ClaimedMixer
from dtcp.mixer_positions import check_position_ids
from dtcp.sequence.row_layouts import on_line
from dtcp.sparse.exchange import bring_left, prepend_halo
from dtcp.sparse.metadata import SparseMetadata
from dtcp.sparse.mixer import CompressedSparseAttention, Index
from dtcp.sparse.relayout import relayout_operands


class ContextParallelSparse(ClaimedMixer, CompressedSparseAttention):
    """A CompressedSparseAttention that a style has taken over."""

    carry_out = CompressedSparseAttention.forward

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        metadata: Any,
        sink: Tensor,
        tokens: Prepool | None,
        index: Index | None,
    ) -> Tensor:
        if isinstance(metadata, SparseMetadata):
            if not metadata.in_line:
                return super().attend(q, keys, metadata, sink, tokens, index)
            rows = (on_line(q), on_line(keys))
            tokens = None if tokens is None else _tokens_on_line(tokens)
            if index is not None:
                of_index = _tokens_on_line(index.keys)
                index = Index(on_line(index.q), on_line(index.weight), of_index)
            return super().attend(*rows, metadata, sink, tokens, index).view(q.shape)
        parts = [q, keys, *_tensors(tokens)]
        # An indexer has no gradient, and so none travels back.
        no_gradient = [] if index is None else [index.q, index.weight, *_tensors(index.keys)]
        parts += [x.detach() for x in no_gradient]
        q, keys, *rest = relayout_operands(parts, metadata.there, self.groups[0])
        if tokens is not None:
            tokens = tokens._replace(value=rest[0], gate=rest[1])
        if index is not None:
            of_index = index.keys._replace(value=rest[4], gate=rest[5])
            index = Index(rest[2], rest[3], of_index)
        out = super().attend(q, keys, metadata.inside, sink, tokens, index)
        return apply_relayout(out, metadata.there, self.groups[0], reverse=True)

    def check_position_ids(self, position_ids: Tensor, attn_metadata: BatchMetadata) -> None:
        metadata = self.own(attn_metadata)
        of_rank = metadata if isinstance(metadata, SparseMetadata) else metadata.here
        seen = (of_rank.last >= 0).view(of_rank.position_ids.shape)
        check_position_ids(position_ids, of_rank.position_ids, seen)

    def bring(
        self, keys: Tensor, pooled: Tensor | None, metadata: SparseMetadata
    ) -> tuple[Tensor, Tensor | None]:
        if pooled is not None and pooled.dtype != keys.dtype:
            raise TypeError(
                f"Keys and the tokens to pool travel in one message of one dtype, got keys of "
                f"{keys.dtype} and tokens of {pooled.dtype}: convert them to one."
            )
        pieces = [keys] if pooled is None else [keys, pooled]
        if metadata.in_line:
            orders = [metadata.key_order, metadata.pooled_order][: len(pieces)]
            lengths = [len(order) - keys.shape[1] for order in orders]
            halos = bring_left(pieces, *metadata.halos, lengths, self.groups[0])
            keys, *rest = (
                torch.cat((x, left), dim=1).index_select(1, order)
                for x, left, order in zip(pieces, halos, orders, strict=True)
            )
            return keys, rest[0] if rest else None
        segments = self._segments(metadata)
        reaches = [self.window - 1, *self._reach()]
        lengths = [segments * reach for reach in reaches]
        halos = bring_left(pieces, *metadata.halos, lengths, self.groups[0])
        keys, *rest = (
            prepend_halo(x, left, segments) for x, left in zip(pieces, halos, strict=True)
        )
        return keys, rest[0] if rest else None

    def gather(self, entries: Tensor, metadata: SparseMetadata) -> Tensor:
        if metadata.in_line:
            routes, number = metadata.of_entries, metadata.closing.shape[1]
            return bring_left([entries], *routes, [number], self.groups[0])[0]
        nodes = self.style.ranks_per_node
        gathered = all_gather_on_nodes(entries, self.axis, dim=1, ranks_per_node=nodes)
        if self._segments(metadata) == 1:
            # They arrive in order.
            return gathered
        parts = gathered.unflatten(1, (len(metadata.order), -1))
        return parts.index_select(1, metadata.order).flatten(1, 2)

    def _segments(self, metadata: SparseMetadata) -> int:
        return len(metadata.order) // self.num_shards

    def _reach(self) -> list[int]:
        return [] if self.compression is None else [self.compression.reach]


def _tokens_on_line(tokens: Prepool) -> Prepool:
    return tokens._replace(value=on_line(tokens.value), gate=on_line(tokens.gate))


def _tensors(tokens: Prepool | None) -> list[Tensor]:
    return [] if tokens is None else [tokens.value, tokens.gate]
