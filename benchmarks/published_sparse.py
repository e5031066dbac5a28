"""The published way, kept to check ours against: gather everything, mask everything.

Raw keys and, in fp32, all tokens to pool are gathered; every rank pools every window; scores,
mask and softmax are dense, [L, S + P]. It shares with our way the projections before it and the
predicate on coordinates, and nothing of the exchange, the tiles, the selection or the kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from dtcp.distributed.collectives import all_gather
from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.sparse.pooling import Prepool, pool
from dtcp.metadata import BatchMetadata
from dtcp.mixer import ClaimedMixer, Mixer
from dtcp.sequence.layout import Contiguous, SequenceLayout
from dtcp.sequence.masks import Coords
from dtcp.sparse.metadata import SparseMetadata
from dtcp.sparse.mixer import CompressedSparseAttention, Index
from dtcp.style import MixerStyle


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
        metadata: SparseMetadata = self.own(attn_metadata)
        keys = all_gather(keys, self.mesh, dim=1)
        seen = _sees(
            metadata.window_first, metadata.last, metadata.key_token_index.expand(len(keys), -1)
        )
        if tokens is not None:
            entries = self._all_entries(tokens, metadata)
            visible = _sees(metadata.first, metadata.last, metadata.closing)
            if index is not None:
                visible = self._chosen(index, visible, metadata)
            keys, seen = torch.cat((keys, entries), 1), torch.cat((seen, visible), 2)
        return _dense(q, keys, seen, sink, self.scale)

    def _all_entries(self, tokens: Prepool, metadata: SparseMetadata) -> Tensor:
        wide = accumulation(tokens.value.dtype)
        value, gate = (
            all_gather(x.to(wide), self.mesh, dim=1) for x in (tokens.value, tokens.gate)
        )
        assert self.compression is not None
        whole = Prepool(value, gate, tokens.bias, tokens.finish)
        pooled = pool(whole, metadata.windows, overlap=self.compression.overlap)
        return tokens.finish(pooled.to(tokens.value.dtype), metadata.entry_position_ids)

    def _chosen(self, index: Index, visible: Tensor, metadata: SparseMetadata) -> Tensor:
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

    Its memory is O(L * S) and its traffic that of all raw keys and tokens to pool.
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
        return replace(whole, **parts)


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
