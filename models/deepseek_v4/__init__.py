"""DeepSeek-V4: compressed sparse attention, experts, hyper-connections."""

from dtcp.models.deepseek_v4.attention import Attention
from dtcp.models.deepseek_v4.config import PRESETS, DeepseekV4Config, tiny
from dtcp.models.deepseek_v4.experts import TopKRouter
from dtcp.models.deepseek_v4.model import Block, DeepseekV4
from dtcp.models.deepseek_v4.rope import TailRope, Yarn
from dtcp.models.deepseek_v4.state_dict import config_from_hf, config_to_hf, from_hf, to_hf

__all__ = [
    "PRESETS",
    "Attention",
    "Block",
    "DeepseekV4",
    "DeepseekV4Config",
    "TailRope",
    "TopKRouter",
    "Yarn",
    "config_from_hf",
    "config_to_hf",
    "from_hf",
    "tiny",
    "to_hf",
]
