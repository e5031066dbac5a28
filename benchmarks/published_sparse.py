"""The published way, kept to check ours against: gather everything, mask everything.

Raw keys of all layers are gathered. Layers whose windows overlap (ratio 4) gather, in fp32, all
tokens to pool, and every rank pools every window; the others (ratio 128) pool the windows of their
own shard and gather entries. Scores, mask and softmax are dense, [L, S + P]. It shares with our way
the projections before it and the predicate on coordinates, and nothing of the exchange, the tiles,
the selection or the kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from dtcp.distributed.collectives import all_gather
from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.sparse.pooling import Prepool, Windows, pool
from dtcp.metadata import BatchMetadata
from dtcp.mixer import ClaimedMixer, Mixer
from dtcp.sequence.coords import Coords
from dtcp.sequence.layout import Contiguous, SequenceLayout
from dtcp.sparse.metadata import NOWHERE, SparseMetadata
from dtcp.sparse.mixer import CompressedSparseAttention, Index
from dtcp.style import MixerStyle


@dataclass(frozen=True, eq=False)
class _PublishedMetadata(SparseMetadata):
    """Of whole rows, but for what the queries of one rank see."""

    slot: Tensor | None = None
    """[B, E] int32, where entries lie that each rank pools itself; None where all pool all."""


class _PublishedSparse(ClaimedMixer, CompressedSparseAttention):
    """A mixer that the style has taken over."""

    def carry_out(
        self,
        q: Tensor,
        keys: Tensor,
        attn_metadata: BatchMetadata,
        *,
        sink: Tensor,
        tokens: Prepool | None = None,
        index: Index | None = None,
    ) -> Tensor:
        metadata: _PublishedMetadata = self.own(attn_metadata)
        keys = all_gather(keys, self.mesh, dim=1)
        seen = _sees(
            metadata.window_first, metadata.last, metadata.key_token_index.expand(len(keys), -1)
        )
        if tokens is not None:
            own = metadata.slot is not None
            entries = (self._gathered_entries if own else self._all_entries)(tokens, metadata)
            visible = _sees(metadata.first, metadata.last, metadata.closing)
            if index is not None:
                visible = self._chosen(index, visible, metadata)
            keys, seen = torch.cat((keys, entries), 1), torch.cat((seen, visible), 2)
        return _dense(q, keys, seen, sink, self.scale)

    def _gathered_entries(self, tokens: Prepool, metadata: _PublishedMetadata) -> Tensor:
        """Pool the windows of this shard and gather their entries, in the order of the metadata."""
        assert self.compression is not None and metadata.slot is not None
        rows, length = tokens.value.shape[:2]
        ratio = self.compression.ratio
        end = torch.arange(ratio - 1, length, ratio, device=tokens.value.device)
        end = end.int().expand(rows, -1)
        position_ids, dtype = metadata.position_ids[:, ::ratio], tokens.value.dtype
        value, gate = (x.to(accumulation(dtype)) for x in (tokens.value, tokens.gate))
        own = Windows(end, torch.zeros_like(end), position_ids)
        pooled = pool(Prepool(value, gate, tokens.bias, tokens.finish), own, overlap=False)
        entries = all_gather(tokens.finish(pooled.to(dtype), position_ids), self.mesh, dim=1)
        index = metadata.slot.long()[..., None].expand(-1, -1, entries.shape[-1])
        return entries.gather(1, index)

    def _all_entries(self, tokens: Prepool, metadata: _PublishedMetadata) -> Tensor:
        """Gather all tokens to pool, and pool every window on every rank."""
        wide = accumulation(tokens.value.dtype)
        value, gate = (
            all_gather(x.to(wide), self.mesh, dim=1) for x in (tokens.value, tokens.gate)
        )
        assert self.compression is not None
        whole = Prepool(value, gate, tokens.bias, tokens.finish)
        pooled = pool(whole, metadata.windows, overlap=self.compression.overlap)
        return tokens.finish(pooled.to(tokens.value.dtype), metadata.entry_position_ids)

    def _chosen(self, index: Index, visible: Tensor, metadata: _PublishedMetadata) -> Tensor:
        assert self.compression is not None and self.compression.selected is not None
        with torch.no_grad():
            keys = self._all_entries(index.keys, metadata)
            scores = torch.einsum("blhd,bpd->blhp", index.q, keys).relu()
            scores = torch.einsum("blhp,blh->blp", scores, index.weight)
            best = scores.masked_fill(~visible, -inf)
            chosen = best.topk(min(self.compression.selected, best.shape[-1]), dim=-1).indices
            return visible & torch.zeros_like(visible).scatter(-1, chosen, True)


@dataclass
class PublishedSparseCP(MixerStyle):
    """Carry out CompressedSparseAttention as NeMo Automodel and Miles do: for comparison only.

    Its memory is O(L * S) and its traffic that of all raw keys, and of tokens to pool where windows
    overlap. The published code moves documents to where shards cut no window before it cuts rows;
    here, where one is cut, all tokens to pool are gathered.
    """

    claims: ClassVar[Mapping[type[Mixer], type[ClaimedMixer]]] = {
        CompressedSparseAttention: _PublishedSparse
    }
    layouts: ClassVar[tuple[type[SequenceLayout], ...]] = (Contiguous,)

    def make_metadata(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> SparseMetadata:
        assert isinstance(mixer, CompressedSparseAttention)
        self.check(mixer, layout)
        whole = mixer.whole_row_metadata(coords)
        local = ("window_first", "first", "last", "position_ids")
        parts = {name: layout.shard(getattr(whole, name), rank).contiguous() for name in local}
        values = {each.name: getattr(whole, each.name) for each in fields(whole)} | parts
        return _PublishedMetadata(**values, slot=_slots(mixer, whole, layout))


def _slots(
    mixer: CompressedSparseAttention, whole: SparseMetadata, layout: SequenceLayout
) -> Tensor | None:
    """Where each window's entry lies if every rank pools its shard from its first token on."""
    how = mixer.compression
    if how is None or how.overlap or layout.shard_len % how.ratio:
        return None
    real = whole.closing != NOWHERE
    if bool((((whole.end + 1) % how.ratio != 0) & real).any()):
        return None
    return whole.end // how.ratio


def _sees(first: Tensor, last: Tensor, position: Tensor) -> Tensor:
    """[B, L, P] bool."""
    at = position[:, None]
    return (at >= first[..., None]) & (at <= last[..., None])


def _dense(q: Tensor, keys: Tensor, seen: Tensor, sink: Tensor, scale: float) -> Tensor:
    """Attention over all keys with a column for the sink: [B, L, H, D]."""
    scores = torch.einsum("blhd,bkd->bhlk", q, keys) * scale
    scores = scores.masked_fill(~seen[:, None], -inf)
    column = sink[:, None, None].to(scores.dtype).expand(*scores.shape[:3], 1)
    weights = torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("bhlk,bkd->blhd", weights, keys)
