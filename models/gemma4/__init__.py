"""Gemma 4 text decoders: dense, with experts, or with per-layer embeddings."""

from dtcp.models.gemma4.config import (
    PRESETS,
    Gemma4Config,
    HeadShape,
    LayerType,
    MoEConfig,
    layer_pattern,
    tiny,
    tiny_e,
    tiny_moe,
)
from dtcp.models.gemma4.model import Attention, Block, Gemma4
from dtcp.models.gemma4.state_dict import config_from_hf, config_to_hf, from_hf, to_hf

__all__ = [
    "PRESETS",
    "Attention",
    "Block",
    "Gemma4",
    "Gemma4Config",
    "HeadShape",
    "LayerType",
    "MoEConfig",
    "config_from_hf",
    "config_to_hf",
    "from_hf",
    "layer_pattern",
    "tiny",
    "tiny_e",
    "tiny_moe",
    "to_hf",
]
