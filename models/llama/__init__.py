"""Dense decoders of the Llama and Qwen family."""

from dtcp.models.llama.config import PRESETS, LlamaConfig, tiny
from dtcp.models.llama.model import Attention, Block, Llama
from dtcp.models.llama.state_dict import config_from_hf, config_to_hf, from_hf, to_hf

__all__ = [
    "PRESETS",
    "Attention",
    "Block",
    "Llama",
    "LlamaConfig",
    "config_from_hf",
    "config_to_hf",
    "from_hf",
    "tiny",
    "to_hf",
]
