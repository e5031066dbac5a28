"""What an indexer and the attention to what it picks become once a style has taken them over."""

from typing import ClassVar

import torch
from torch import Tensor

from dtcp.mixer import ClaimedMixer
from dtcp.sequence.row_layouts import on_line
from dtcp.softmax.gathered_rows import gather_rows
from dtcp.sparse_latent.blocks import BlocksInSight
from dtcp.sparse_latent.metadata import ExchangedTokens, TokensInSight
from dtcp.sparse_latent.mixer import LightningIndexer, SparseLatentAttention, TokenReader
from dtcp.sparse_latent.pooled import PooledIndexer


class BringsTokens(ClaimedMixer, TokenReader):
    """A TokenReader whose tokens come from other ranks."""

    has_gradients: ClassVar[bool] = True
    """Whether what is brought has gradients."""

    wide: bool = False

    def bring(self, rows: Tensor, metadata: TokensInSight, dtype: torch.dtype) -> Tensor:
        assert isinstance(metadata, ExchangedTokens)
        return gather_rows(rows, metadata.exchange.tensors(), self.groups[-1], dtype, self.wide)


class ContextParallelIndexer(BringsTokens, LightningIndexer):
    """A LightningIndexer that a style has taken over."""

    has_gradients = False

    carry_out = LightningIndexer.forward

    def select(self, q: Tensor, weight: Tensor, key: Tensor, metadata: TokensInSight) -> Tensor:
        if not metadata.in_line:
            return super().select(q, weight, key, metadata)
        selected = super().select(on_line(q), on_line(weight), on_line(key), metadata)
        return selected.view(*q.shape[:2], -1)


class ContextParallelPooledIndexer(BringsTokens, PooledIndexer):
    """A PooledIndexer that a style has taken over."""

    has_gradients = False

    carry_out = PooledIndexer.forward

    def select(
        self,
        q: Tensor,
        weight: Tensor,
        key: Tensor,
        gate: Tensor,
        bias: Tensor,
        metadata: BlocksInSight,
    ) -> Tensor:
        if not metadata.in_line:
            return super().select(q, weight, key, gate, bias, metadata)
        line = on_line(q), on_line(weight), on_line(key), on_line(gate)
        return super().select(*line, bias, metadata).view(*q.shape[:2], -1)


class ContextParallelSparseLatent(BringsTokens, SparseLatentAttention):
    """A SparseLatentAttention that a style has taken over."""

    carry_out = SparseLatentAttention.forward

    def attend(
        self,
        q: Tensor,
        rows: Tensor,
        up: Tensor,
        selected: Tensor,
        metadata: TokensInSight,
        sink: Tensor | None,
    ) -> Tensor:
        if not metadata.in_line:
            return super().attend(q, rows, up, selected, metadata, sink)
        out = super().attend(on_line(q), on_line(rows), up, on_line(selected), metadata, sink)
        return out.view(*q.shape[:3], -1)
