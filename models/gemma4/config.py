"""Sizes of a Gemma 4 text decoder: dense, with experts, or with per-layer embeddings."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from dtcp.models.gemma4.rope import ProportionalRope
from dtcp.models.inputs import check_heads
from dtcp.models.moe import check_top_k
from dtcp.sequence.masks import BlockBidirectional, Causal, Mask, SlidingWindow


class LayerType(Enum):
    """What the attention of a layer sees; values are Hugging Face's words."""

    SLIDING = "sliding_attention"
    GLOBAL = "full_attention"


@dataclass(frozen=True)
class HeadShape:
    """The attention heads of one type of layer.

    Args:
        rotated: the fraction of channel pairs that rotate; the others carry no position.
    """

    head_dim: int
    num_kv_heads: int
    rope_theta: float
    rotated: float = 1.0

    @property
    def rope(self) -> ProportionalRope:
        return ProportionalRope(self.head_dim, self.rope_theta, rotated=self.rotated)


@dataclass(frozen=True)
class MoEConfig:
    """Experts beside the dense feed-forward part, top_k of them for each token.

    Args:
        balance_weight, z_weight: of the routers' losses in training (dtcp.experts.RouterLoss).
    """

    num_experts: int
    top_k: int
    hidden_dim: int
    balance_weight: float = 0.0
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        check_top_k("MoEConfig", "top_k", self.top_k, self.num_experts)


@dataclass(frozen=True)
class Gemma4Config:
    """A Gemma 4 text decoder.

    Args:
        hidden_dim: of the dense feed-forward part.
        layer_types: what each layer sees.
        window: tokens that a query of a sliding layer sees, itself included.
        keys_from_values: in global layers one projection, normalized, is the value, and the key
            is that value scaled and rotated ("K = V").
        num_shared_layers: so many last layers have no keys and values of their own, and attend
            to those of the last layer before them that is of their type.
        double_wide: those layers have twice as many feed-forward channels.
        per_layer_dim: channels of the per-layer embeddings; 0 for none.
        moe: None for no experts.
        softcap: logits become softcap * tanh(logits / softcap); 0 for none.
        vision_blocks: in sliding layers the tokens of an image see each other.
        longest_vision_block: tokens; how far to the right a sliding layer may look.
        pad_id: the token whose embedding is not trained; None for none.
    """

    vocab_size: int
    dim: int
    hidden_dim: int
    num_heads: int
    layer_types: tuple[LayerType, ...]
    window: int
    sliding_heads: HeadShape
    global_heads: HeadShape
    keys_from_values: bool = False
    num_shared_layers: int = 0
    double_wide: bool = False
    per_layer_dim: int = 0
    per_layer_vocab_size: int = 0
    moe: MoEConfig | None = None
    softcap: float = 0.0
    vision_blocks: bool = False
    longest_vision_block: int = 1120
    norm_eps: float = 1e-6
    pad_id: int | None = 0
    tied: bool = True

    def __post_init__(self) -> None:
        for shape in (self.sliding_heads, self.global_heads):
            check_heads("Gemma4Config", self.num_heads, shape.num_kv_heads)
        if self.num_shared_layers and not set(self.layer_types) <= set(self.own_kv_layer_types):
            raise ValueError(
                f"Gemma4Config shares the keys of a layer of the same type, got "
                f"num_shared_layers={self.num_shared_layers} of {self.num_layers} layers, with "
                f"none of a type before them: share fewer layers."
            )
        if bool(self.per_layer_dim) != bool(self.per_layer_vocab_size):
            raise ValueError(
                f"Per-layer embeddings have channels and a vocabulary, got per_layer_dim="
                f"{self.per_layer_dim}, per_layer_vocab_size={self.per_layer_vocab_size}: set "
                f"both, or neither."
            )

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def head_dim(self) -> int:
        """Channels of a head, averaged over the layers, as FLOPs are counted."""
        return sum(self.heads(i).head_dim for i in range(self.num_layers)) // self.num_layers

    @property
    def own_kv_layer_types(self) -> tuple[LayerType, ...]:
        """The types of the layers that have keys and values of their own: all but the last."""
        return self.layer_types[: max(0, self.num_layers - self.num_shared_layers)]

    def heads(self, layer: int) -> HeadShape:
        return (
            self.sliding_heads
            if self.layer_types[layer] is LayerType.SLIDING
            else self.global_heads
        )

    def reads_shared_kv(self, layer: int) -> bool:
        """Whether a layer attends to the keys and values of an earlier one."""
        return layer >= len(self.own_kv_layer_types)

    def gives_shared_kv(self, layer: int) -> bool:
        """Whether later layers attend to this layer's keys and values."""
        if not self.num_shared_layers or self.reads_shared_kv(layer):
            return False
        layer_type = self.layer_types[layer]
        is_read = layer_type in self.layer_types[-self.num_shared_layers :]
        return is_read and layer_type not in self.own_kv_layer_types[layer + 1 :]

    def has_keys_from_values(self, layer: int) -> bool:
        """Whether a key of the layer is its value, scaled and rotated."""
        return self.keys_from_values and self.layer_types[layer] is LayerType.GLOBAL

    def mask(self, layer: int) -> Mask:
        """What a layer sees; only in sliding layers is each image a block."""
        if self.layer_types[layer] is LayerType.GLOBAL:
            return Causal()
        ahead = Causal() | BlockBidirectional() if self.vision_blocks else Causal()
        return SlidingWindow(self.window) & ahead


def layer_pattern(pattern: str, num_layers: int) -> tuple[LayerType, ...]:
    """Layer types by a repeated pattern of "s", sliding, and "g", global; the last is global."""
    types = {"s": LayerType.SLIDING, "g": LayerType.GLOBAL}
    repeated = [types[pattern[i % len(pattern)]] for i in range(num_layers)]
    return (*repeated[:-1], LayerType.GLOBAL)


def tiny(vocab_size: int = 512) -> Gemma4Config:
    """Small enough for a laptop's CPU: dense, with sliding windows and keys from values."""
    return Gemma4Config(
        vocab_size=vocab_size,
        dim=128,
        hidden_dim=384,
        num_heads=8,
        layer_types=layer_pattern("ssg", 6),
        window=128,
        sliding_heads=HeadShape(16, 4, 1e4),
        global_heads=HeadShape(32, 2, 1e6, rotated=0.25),
        keys_from_values=True,
        softcap=30.0,
    )


def tiny_moe(vocab_size: int = 512) -> Gemma4Config:
    """As tiny, with experts beside the dense feed-forward part."""
    return replace(tiny(vocab_size), moe=MoEConfig(num_experts=8, top_k=2, hidden_dim=64))


def tiny_e(vocab_size: int = 512) -> Gemma4Config:
    """As tiny, with per-layer embeddings, and with keys and values that the last layers share."""
    return replace(
        tiny(vocab_size),
        keys_from_values=False,
        num_shared_layers=3,
        double_wide=True,
        per_layer_dim=16,
        per_layer_vocab_size=vocab_size,
    )


_VOCABULARY = 262_144

PRESETS: Mapping[str, Gemma4Config] = {
    "tiny": tiny(),
    "tiny-moe": tiny_moe(),
    "tiny-e": tiny_e(),
    "gemma4-31b": Gemma4Config(
        vocab_size=_VOCABULARY,
        dim=5376,
        hidden_dim=21_504,
        num_heads=32,
        layer_types=layer_pattern("sssssg", 60),
        window=1024,
        sliding_heads=HeadShape(256, 16, 1e4),
        global_heads=HeadShape(512, 4, 1e6, rotated=0.25),
        keys_from_values=True,
        softcap=30.0,
        vision_blocks=True,
    ),
    "gemma4-26b-a4b": Gemma4Config(
        vocab_size=_VOCABULARY,
        dim=2816,
        hidden_dim=2112,
        num_heads=16,
        layer_types=layer_pattern("sssssg", 30),
        window=1024,
        sliding_heads=HeadShape(256, 8, 1e4),
        global_heads=HeadShape(512, 2, 1e6, rotated=0.25),
        keys_from_values=True,
        moe=MoEConfig(num_experts=128, top_k=8, hidden_dim=704),
        softcap=30.0,
        vision_blocks=True,
    ),
    "gemma4-e4b": Gemma4Config(
        vocab_size=_VOCABULARY,
        dim=2560,
        hidden_dim=10_240,
        num_heads=8,
        layer_types=layer_pattern("sssssg", 42),
        window=512,
        sliding_heads=HeadShape(256, 2, 1e4),
        global_heads=HeadShape(512, 2, 1e6, rotated=0.25),
        num_shared_layers=18,
        per_layer_dim=256,
        per_layer_vocab_size=_VOCABULARY,
        softcap=30.0,
    ),
    "gemma4-e2b": Gemma4Config(
        vocab_size=_VOCABULARY,
        dim=1536,
        hidden_dim=6144,
        num_heads=8,
        layer_types=layer_pattern("ssssg", 35),
        window=512,
        sliding_heads=HeadShape(256, 1, 1e4),
        global_heads=HeadShape(512, 1, 1e6, rotated=0.25),
        num_shared_layers=20,
        double_wide=True,
        per_layer_dim=256,
        per_layer_vocab_size=_VOCABULARY,
        softcap=30.0,
    ),
}
