"""Qwen3.5: a hybrid of the gated delta rule and full attention, dense or with experts."""

from dtcp.models.qwen3_5.config import PRESETS, DeltaNetConfig, MoEConfig, Qwen35Config, tiny
from dtcp.models.qwen3_5.model import Attention, Block, GatedDeltaNet, Qwen35
from dtcp.models.qwen3_5.state_dict import config_from_hf, config_to_hf, from_hf, to_hf

__all__ = [
    "PRESETS",
    "Attention",
    "Block",
    "DeltaNetConfig",
    "GatedDeltaNet",
    "MoEConfig",
    "Qwen35",
    "Qwen35Config",
    "config_from_hf",
    "config_to_hf",
    "from_hf",
    "tiny",
    "to_hf",
]
