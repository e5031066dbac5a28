"""Sizes of a Qwen3.5, dense or with experts, and those of the published models."""

from collections.abc import Mapping
from dataclasses import dataclass

from dtcp.models.inputs import check_heads
from dtcp.models.moe import check_top_k
from dtcp.models.qwen3_5.rope import InterleavedRope


@dataclass(frozen=True)
class DeltaNetConfig:
    """A layer of the gated delta rule.

    Args:
        conv_width: tokens that the convolution in front of the rule reads.
    """

    key_heads: int = 16
    value_heads: int = 32
    key_dim: int = 128
    value_dim: int = 128
    conv_width: int = 4

    def __post_init__(self) -> None:
        if self.value_heads % self.key_heads:
            raise ValueError(
                f"DeltaNetConfig shares each key head among equally many value heads, got "
                f"key_heads={self.key_heads}, value_heads={self.value_heads}: make value_heads a "
                f"multiple of key_heads."
            )


@dataclass(frozen=True)
class MoEConfig:
    """Experts, top_k of them for each token, and one shared expert for all tokens.

    Args:
        hidden_dim: channels of each expert.
        shared_hidden_dim: channels of the shared expert.
        balance_weight, z_weight: of the routers' losses in training (dtcp.experts.RouterLoss).
    """

    num_experts: int
    top_k: int
    hidden_dim: int
    shared_hidden_dim: int
    balance_weight: float = 0.0
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        check_top_k("MoEConfig", "top_k", self.top_k, self.num_experts)


@dataclass(frozen=True)
class Qwen35Config:
    """A decoder in which every `full_attention_every`-th layer attends, and the others recur.

    Args:
        feed_forward: channels of a dense feed-forward part, or its experts.
        rotary_dim: channels of a head that rotate with the position.
        rope_sections: frequencies of time, height and width.
        num_mtp_layers: layers that predict the token after the next one; 0 or 1.
        tied: the language-model head shares the embedding's weight.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    feed_forward: int | MoEConfig
    head_dim: int = 256
    delta: DeltaNetConfig = DeltaNetConfig()
    full_attention_every: int = 4
    rotary_dim: int = 64
    rope_theta: float = 1e7
    rope_sections: tuple[int, int, int] = (11, 11, 10)
    norm_eps: float = 1e-6
    num_mtp_layers: int = 0
    tied: bool = False

    def __post_init__(self) -> None:
        check_heads("Qwen35Config", self.num_heads, self.num_kv_heads)
        if self.num_mtp_layers not in (0, 1):
            raise ValueError(
                f"Qwen3.5 predicts one more token with one more layer, got "
                f"num_mtp_layers={self.num_mtp_layers}: choose 0 or 1."
            )
        if self.rotary_dim > self.head_dim:
            raise ValueError(
                f"Qwen35Config rotates part of a head, got rotary_dim={self.rotary_dim} of "
                f"head_dim={self.head_dim}: choose at most head_dim."
            )

    @property
    def rope(self) -> InterleavedRope:
        return InterleavedRope(self.rotary_dim, self.rope_theta, self.rope_sections)

    def attends(self, layer: int) -> bool:
        """Whether a layer has full attention; the others have the gated delta rule."""
        return (layer + 1) % self.full_attention_every == 0


def tiny(vocab_size: int = 512, *, experts: bool = False) -> Qwen35Config:
    """Small enough for a laptop's CPU, with every kind of module that the large ones have."""
    moe = MoEConfig(num_experts=8, top_k=2, hidden_dim=64, shared_hidden_dim=64)
    return Qwen35Config(
        vocab_size=vocab_size,
        dim=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        feed_forward=moe if experts else 384,
        delta=DeltaNetConfig(key_heads=2, value_heads=4, key_dim=16, value_dim=32),
        rotary_dim=8,
        rope_sections=(2, 1, 1),
    )


def _published(
    num_layers: int,
    dim: int,
    heads: tuple[int, int],
    feed_forward: int | MoEConfig,
    value_heads: int,
    *,
    tied: bool = False,
) -> Qwen35Config:
    return Qwen35Config(
        vocab_size=248_320,
        dim=dim,
        num_layers=num_layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        feed_forward=feed_forward,
        delta=DeltaNetConfig(value_heads=value_heads),
        num_mtp_layers=1,
        tied=tied,
    )


PRESETS: Mapping[str, Qwen35Config] = {
    "tiny": tiny(),
    "tiny-moe": tiny(experts=True),
    "qwen3.5-0.8b": _published(24, 1024, (8, 2), 3584, 16, tied=True),
    "qwen3.5-2b": _published(24, 2048, (8, 2), 6144, 16, tied=True),
    "qwen3.5-4b": _published(32, 2560, (16, 4), 9216, 32, tied=True),
    "qwen3.5-9b": _published(32, 4096, (16, 4), 12_288, 32),
    "qwen3.5-27b": _published(64, 5120, (24, 4), 17_408, 48),
    "qwen3.5-35b-a3b": _published(40, 2048, (16, 2), MoEConfig(256, 8, 512, 512), 32),
    "qwen3.5-122b-a10b": _published(48, 3072, (32, 2), MoEConfig(256, 8, 1024, 1024), 64),
    "qwen3.5-397b-a17b": _published(60, 4096, (32, 2), MoEConfig(512, 10, 1024, 1024), 64),
}
