"""Attention of DeepSeek-V4: low-rank queries, one shared kv head, compressed entries.

H query heads of D channels read one key per token, which is its value too. Values are therefore
rotated, and the output is rotated back. Tokens read each other in the mixer only.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtcp.metadata import BatchMetadata
from dtcp.models.blocks import ParameterModule, RMSNorm
from dtcp.models.deepseek_v4.config import DeepseekV4Config
from dtcp.models.deepseek_v4.rope import TailRope
from dtcp.sparse.mixer import CompressedSparseAttention, Compression, Index, Prepool


class Attention(nn.Module):
    """Projections, rotary embedding, and the mixer: where tokens read each other."""

    def __init__(self, config: DeepseekV4Config, layer: int) -> None:
        super().__init__()
        self.head_dim, self.eps, self.rope = config.head_dim, config.norm_eps, config.rope(layer)
        q_dim = config.num_heads * config.head_dim
        self.q_a_proj = nn.Linear(config.dim, config.query_rank, bias=False)
        self.q_norm = RMSNorm(config.query_rank, config.norm_eps)
        self.q_b_proj = nn.Linear(config.query_rank, q_dim, bias=False)
        self.kv_proj = nn.Linear(config.dim, config.head_dim, bias=False)
        self.kv_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.rotate = RotaryEmbedding(self.rope)
        # One score per head, in the denominator of its softmax only.
        self.sink = ParameterModule(config.num_heads)
        compression = config.compression(layer)
        self.compressor = self.indexer = None
        if compression is not None:
            self.compressor = Compressor(
                config.dim, config.head_dim, compression, self.rope, config.norm_eps
            )
            if compression.selected is not None:
                self.indexer = Indexer(config, compression, self.rope)
        scale = config.head_dim**-0.5
        self.mixer = CompressedSparseAttention(config.window, compression, scale=scale)
        self.o_a_proj = GroupedLinear(q_dim, config.output_groups, config.output_rank)
        o_dim = config.output_groups * config.output_rank
        self.o_b_proj = nn.Linear(o_dim, config.dim, bias=False)

    def forward(self, x: Tensor, position_ids: Tensor, attn_metadata: BatchMetadata) -> Tensor:
        self.mixer.check_position_ids(position_ids, attn_metadata)
        query = self.q_norm(self.q_a_proj(x))  # [B, L, query_rank]
        # The projection's width tells the number of heads: a plan may split heads over ranks.
        q = self.q_b_proj(query).unflatten(-1, (-1, self.head_dim))
        q = self.rope(F.rms_norm(q, q.shape[-1:], eps=self.eps), position_ids)
        keys = self.rotate(self.kv_norm(self.kv_proj(x)), position_ids)
        tokens = None if self.compressor is None else self.compressor(x)
        index = None if self.indexer is None else self.indexer(x, query, position_ids)
        out = self.mixer(q, keys, attn_metadata, sink=self.sink(), tokens=tokens, index=index)
        return self.o_b_proj(self.o_a_proj(self.rope(out, position_ids, back=True)))


class Compressor(nn.Module):
    """Projects tokens to the keys and gates that are pooled into compressed entries."""

    def __init__(
        self, dim: int, head_dim: int, compression: Compression, rope: TailRope, eps: float
    ) -> None:
        super().__init__()
        channels = head_dim * (2 if compression.overlap else 1)
        self.kv_proj = nn.Linear(dim, channels, bias=False)
        self.gate_proj = nn.Linear(dim, channels, bias=False)
        # Added to a token's gates by its index in the window: an absolute position embedding.
        self.place = ParameterModule(compression.ratio, channels)
        self.norm = RMSNorm(head_dim, eps)
        self.rotate = RotaryEmbedding(rope)

    def forward(self, x: Tensor) -> Prepool:
        return Prepool(self.kv_proj(x), self.gate_proj(x), self.place(), self.finish)

    def finish(self, pooled: Tensor, position_ids: Tensor) -> Tensor:
        """Norm and rotate pooled entries."""
        return self.rotate(self.norm(pooled), position_ids)


class Indexer(nn.Module):
    """Scores compressed entries for each query, to select those it reads.

    A selection has no gradient, so neither have these parameters: they are frozen, since weight
    decay would move them all the same.
    """

    def __init__(self, config: DeepseekV4Config, compression: Compression, rope: TailRope) -> None:
        super().__init__()
        heads, dim = config.index_heads, config.index_head_dim
        self.head_dim, self.rope = dim, rope
        self.scale = (heads * dim) ** -0.5
        self.q_proj = nn.Linear(config.query_rank, heads * dim, bias=False)
        self.weight_proj = nn.Linear(config.dim, heads, bias=False)
        self.compressor = Compressor(config.dim, dim, compression, rope, config.norm_eps)
        self.requires_grad_(False)

    def forward(self, x: Tensor, query: Tensor, position_ids: Tensor) -> Index:
        with torch.no_grad():
            q = self.q_proj(query).unflatten(-1, (-1, self.head_dim))
            weight = self.weight_proj(x) * self.scale
            return Index(self.rope(q, position_ids), weight, self.compressor(x))


class GroupedLinear(nn.Module):
    """One projection per group of heads: a block-diagonal matrix."""

    def __init__(self, in_dim: int, groups: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.weight = nn.Parameter(torch.empty(groups * rank, in_dim // groups))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, H, D] -> [B, L, groups * rank]; a group is a run of adjacent heads."""
        weight = self.weight.unflatten(0, (-1, self.rank))  # [groups, rank, channels]
        grouped = x.flatten(-2).unflatten(-1, (len(weight), -1))
        return torch.einsum("blgc,grc->blgr", grouped, weight).flatten(-2)

    def reset_parameters(self, std: float = 0.02) -> None:
        for weight in self.parameters():
            nn.init.normal_(weight, std=std)


class RotaryEmbedding(nn.Module):
    """A rotation as a module, so a plan can name the place where all heads read the result."""

    def __init__(self, rope: TailRope) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        return self.rope(x, position_ids)
