"""The published way, kept to check ours against: gather everything, mask everything.

Raw keys and, in fp32, all tokens to pool are gathered; every rank pools every window; scores,
mask and softmax are dense, [L, S + P]. It shares with our way the projections before it and the
predicate on coordinates, and nothing of the exchange, the tiles, the selection or the kernel.
"""

from dataclasses import dataclass
from math import inf
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.distributed.collectives import all_gather, connect, group_name
from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.sparse.pooling import Prepool, pool
from dtcp.mixer import BatchMetadata
from dtcp.sequence.layout import Contiguous, SequenceLayout
from dtcp.sequence.masks import Coords
from dtcp.sparse.mixer import (
    CompressedSparseAttention,
    Index,
    SparseMetadata,
    sparse_metadata,
)


@dataclass
class PublishedSparseCP(ParallelStyle):
    """Carry out CompressedSparseAttention as NeMo Automodel and Miles do: for comparison only.

    Its memory is O(L * S) and its traffic that of all raw keys and tokens to pool. Contiguous.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) is not CompressedSparseAttention:
            raise TypeError(
                f"{self} takes over an unclaimed CompressedSparseAttention, got a "
                f"{type(module).__name__}: name the mixer itself in the plan."
            )
        module.__class__ = _PublishedSparse
        cast(_PublishedSparse, module).claim(self, device_mesh)
        return module


class _PublishedSparse(CompressedSparseAttention):
    """A mixer that the style has taken over."""

    def claim(self, style: PublishedSparseCP, mesh: DeviceMesh) -> None:
        self.style, self.mesh = style, mesh
        connect(group_name(mesh))
        self.metadata_key = f"{self.metadata_key} by {style}"

    def make_metadata(self, coords: Coords, layout: SequenceLayout | None) -> SparseMetadata:
        if not isinstance(layout, Contiguous) or layout.num_shards != self.mesh.size():
            raise ValueError(
                f"{self.style} works on Contiguous over {self.mesh.size()} ranks, got "
                f"layout={layout}: shard the batch so, or use CompressedSparseCP."
            )
        whole = [[(0, layout.seq_len)]]
        attn_metadata = sparse_metadata(coords, whole, 0, self.window, self.compression, halo=False)
        rank = self.mesh.get_local_rank()
        mine = ("window_first", "first", "last", "position_ids")
        return attn_metadata._replace(
            **{name: layout.shard(getattr(attn_metadata, name), rank).contiguous() for name in mine}
        )

    def forward(
        self,
        q: Tensor,
        keys: Tensor,
        attn_metadata: BatchMetadata,
        *,
        sink: Tensor,
        tokens: Prepool | None = None,
        index: Index | None = None,
    ) -> Tensor:
        given = SparseMetadata(*attn_metadata[self.metadata_key])
        keys = all_gather(keys, self.mesh, dim=1)
        seen = _sees(given.window_first, given.last, given.key_token_index.expand(len(keys), -1))
        if tokens is not None:
            entries = self._all_entries(tokens, given)
            visible = _sees(given.first, given.last, given.closing)
            if index is not None:
                visible = self._chosen(index, visible, given)
            keys, seen = torch.cat((keys, entries), 1), torch.cat((seen, visible), 2)
        return _dense(q, keys, seen, sink, self.scale)

    def _all_entries(self, tokens: Prepool, given: SparseMetadata) -> Tensor:
        wide = accumulation(tokens.value.dtype)
        value, gate = (
            all_gather(x.to(wide), self.mesh, dim=1) for x in (tokens.value, tokens.gate)
        )
        assert self.compression is not None
        whole = Prepool(value, gate, tokens.bias, tokens.finish)
        pooled = pool(whole, given.windows, overlap=self.compression.overlap)
        return tokens.finish(pooled.to(tokens.value.dtype), given.position)

    def _chosen(self, index: Index, visible: Tensor, given: SparseMetadata) -> Tensor:
        assert self.compression is not None and self.compression.selected is not None
        with torch.no_grad():
            keys = self._all_entries(index.keys, given)
            scores = torch.einsum("blhd,bpd->blhp", index.q, keys).relu()
            scores = torch.einsum("blhp,blh->blp", scores, index.weight)
            best = scores.masked_fill(~visible, -inf)
            chosen = best.topk(min(self.compression.selected, best.shape[-1]), dim=-1).indices
            return visible & torch.zeros_like(visible).scatter(-1, chosen, True)


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
