"""Sizes of a DeepSeek-V4 decoder, and those of the published models."""

from collections.abc import Mapping
from dataclasses import dataclass

from dtcp.models.deepseek_v4.rope import TailRope, Yarn
from dtcp.models.moe import check_top_k
from dtcp.sparse.mixer import Compression

WINDOW, SPARSE = 0, 4
"""Compress ratios of layers without compressed entries, and of those with an indexer."""


@dataclass(frozen=True)
class DeepseekV4Config:
    """A decoder of compressed sparse attention and experts.

    Args:
        compress_ratios: of each layer, then of each MTP layer: 0 for the window alone,
            `sparse_ratio` for overlapping entries that an indexer selects, any other number for
            entries of so many tokens that are all read.
        num_hash_layers: the first layers, which look up a token's experts by its id.
        hidden_dim: channels of each expert, and of the shared one.
        output_groups, output_rank: each group of heads is projected to `output_rank` channels.
        streams: residual streams, mixed by the hyper-connections.
        expert_limit: the bound that an expert's gate and up are clamped to.
        clamp_shared: clamp those of the shared expert, too.
        balance_weight, z_weight: of the routers' losses in training (dtcp.experts.RouterLoss).
    """

    vocab_size: int
    dim: int
    hidden_dim: int
    num_heads: int
    head_dim: int
    rope_dim: int
    query_rank: int
    output_groups: int
    output_rank: int
    compress_ratios: tuple[int, ...]
    num_experts: int
    experts_per_token: int
    route_scale: float
    index_heads: int
    index_head_dim: int
    num_selected: int
    num_layers: int
    num_mtp_layers: int = 0
    num_hash_layers: int = 3
    window: int = 128
    sparse_ratio: int = SPARSE
    streams: int = 4
    sinkhorn_steps: int = 20
    stream_eps: float = 1e-6
    norm_eps: float = 1e-6
    expert_limit: float = 10.0
    clamp_shared: bool = True
    rope_theta: float = 10_000.0
    compress_rope_theta: float = 160_000.0
    yarn: Yarn | None = None
    tied: bool = False
    balance_weight: float = 0.0
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        layers = self.num_layers + self.num_mtp_layers
        if len(self.compress_ratios) != layers:
            raise ValueError(
                f"DeepseekV4Config has one compress ratio per layer, MTP layers last, got "
                f"len(compress_ratios)={len(self.compress_ratios)} with num_layers="
                f"{self.num_layers}, num_mtp_layers={self.num_mtp_layers}: give {layers}."
            )
        if self.tied:
            raise ValueError(
                "DeepseekV4 has a language-model head of its own, got tied=True: no published one "
                "shares the embedding, and this model would not."
            )
        check_top_k(
            "DeepseekV4Config", "experts_per_token", self.experts_per_token, self.num_experts
        )
        if self.num_heads % self.output_groups:
            raise ValueError(
                f"DeepseekV4Config puts equally many heads in each output group, got num_heads="
                f"{self.num_heads}, output_groups={self.output_groups}: make num_heads a multiple."
            )
        if self.rope_dim % 2 or self.rope_dim > min(self.head_dim, self.index_head_dim):
            raise ValueError(
                f"DeepseekV4Config rotates pairs of a head's last channels, got rope_dim="
                f"{self.rope_dim}, head_dim={self.head_dim}, index_head_dim="
                f"{self.index_head_dim}: make it even and no wider than a head."
            )

    def compression(self, layer: int) -> Compression | None:
        """How a layer compresses what it reads beside its window; None for the window alone."""
        ratio = self.compress_ratios[layer]
        if ratio == WINDOW:
            return None
        if ratio == self.sparse_ratio:
            return Compression(ratio, overlap=True, selected=self.num_selected)
        return Compression(ratio)

    def rope(self, layer: int) -> TailRope:
        """The rotary embedding of a layer; layers that compress have one of their own."""
        if self.compress_ratios[layer] == WINDOW:
            return TailRope(self.rope_dim, self.rope_theta)
        return TailRope(self.rope_dim, self.compress_rope_theta, self.yarn)


def tiny(vocab_size: int = 512) -> DeepseekV4Config:
    """Small enough for a laptop's CPU, with every kind of module that the large ones have."""
    return DeepseekV4Config(
        vocab_size=vocab_size,
        dim=64,
        hidden_dim=64,
        num_heads=4,
        head_dim=32,
        rope_dim=8,
        query_rank=32,
        output_groups=2,
        output_rank=16,
        compress_ratios=(0, 4, 16, 4, 0),
        num_experts=8,
        experts_per_token=2,
        route_scale=1.5,
        index_heads=8,
        index_head_dim=16,
        num_selected=16,
        num_layers=4,
        num_mtp_layers=1,
        num_hash_layers=1,
        window=16,
        streams=2,
        sinkhorn_steps=4,
        yarn=Yarn(original_seq_len=256, factor=4.0),
    )


PRESETS: Mapping[str, DeepseekV4Config] = {
    "tiny": tiny(),
    "deepseek-v4-flash": DeepseekV4Config(
        vocab_size=129_280,
        dim=4096,
        hidden_dim=2048,
        num_heads=64,
        head_dim=512,
        rope_dim=64,
        query_rank=1024,
        output_groups=8,
        output_rank=1024,
        compress_ratios=(0, 0, *(4, 128) * 20, 4, 0),
        num_experts=256,
        experts_per_token=6,
        route_scale=1.5,
        index_heads=64,
        index_head_dim=128,
        num_selected=512,
        num_layers=43,
        num_mtp_layers=1,
        yarn=Yarn(),
    ),
    "deepseek-v4-pro": DeepseekV4Config(
        vocab_size=129_280,
        dim=7168,
        hidden_dim=3072,
        num_heads=128,
        head_dim=512,
        rope_dim=64,
        query_rank=1536,
        output_groups=16,
        output_rank=1024,
        compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
        num_experts=384,
        experts_per_token=6,
        route_scale=2.5,
        index_heads=64,
        index_head_dim=128,
        num_selected=1024,
        num_layers=61,
        num_mtp_layers=1,
        yarn=Yarn(),
    ),
}
