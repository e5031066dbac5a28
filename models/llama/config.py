"""Sizes of a dense decoder of the Llama or Qwen family, and those of the published models."""

from collections.abc import Mapping
from dataclasses import dataclass

from dtcp.models.inputs import check_heads
from dtcp.models.rope import Llama3Scaling, Rope


@dataclass(frozen=True)
class LlamaConfig:
    """A dense decoder.

    Args:
        qkv_bias: on the projections to queries, keys and values, as in Qwen2.
        qk_norm: RMSNorm of every query and key head, as in Qwen3.
        tied: the language-model head shares the embedding's weight.
    """

    vocab_size: int
    dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False

    def __post_init__(self) -> None:
        check_heads("LlamaConfig", self.num_heads, self.num_kv_heads)

    @property
    def rope(self) -> Rope:
        return Rope(self.head_dim, self.rope_theta, self.rope_scaling)


def tiny(vocab_size: int = 512) -> LlamaConfig:
    """Small enough for a laptop's CPU, with every kind of module that the large ones have."""
    return LlamaConfig(
        vocab_size=vocab_size,
        dim=128,
        hidden_dim=384,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=16,
        qk_norm=True,
    )


PRESETS: Mapping[str, LlamaConfig] = {
    "tiny": tiny(),
    "llama3.1-8b": LlamaConfig(
        vocab_size=128_256,
        dim=4096,
        hidden_dim=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=500_000.0,
        rope_scaling=Llama3Scaling(factor=8.0),
    ),
    "llama3.2-1b": LlamaConfig(
        vocab_size=128_256,
        dim=2048,
        hidden_dim=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        rope_theta=500_000.0,
        rope_scaling=Llama3Scaling(factor=32.0),
        tied=True,
    ),
    "qwen2.5-0.5b": LlamaConfig(
        vocab_size=151_936,
        dim=896,
        hidden_dim=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        qkv_bias=True,
        tied=True,
    ),
    "qwen3-0.6b": LlamaConfig(
        vocab_size=151_936,
        dim=1024,
        hidden_dim=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        qk_norm=True,
        tied=True,
    ),
    "qwen3-8b": LlamaConfig(
        vocab_size=151_936,
        dim=4096,
        hidden_dim=12_288,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        qk_norm=True,
    ),
}
