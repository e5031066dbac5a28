"""Tiny random models of transformers, one per family."""

from typing import Any

import torch

from dtcp.huggingface.install import _POSITIONS
from dtcp.huggingface.positions import Positions

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
}
WINDOWS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 7},
    "gemma3_text": {**WINDOWS, "query_pre_attn_scalar": 16},
    "gemma2": {**WINDOWS, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gpt_oss": {**WINDOWS, **EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24},
    "mixtral": {**EXPERTS, "num_local_experts": 4, "sliding_window": None},
}
REFUSED: dict[str, dict[str, Any]] = {
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
    "gptj": {"rotary_dim": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt2": {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {},
    "olmo2": {},
    "starcoder2": {"sliding_window": None},
}
"""Families with a part that no mixer, or no tensor-parallel style of ours, computes."""


def config_of(kind: str, **change: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **{**SHAPE, **{**MODELS, **REFUSED}.get(kind, {}), **change})


class Placed(torch.nn.Module):
    """Stands for a model that has its mixers, where nothing else is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        vars(self)[_POSITIONS] = Positions()

    def get_input_embeddings(self) -> None:
        """Takes any id."""


def build(kind: str, *, head: str = "CausalLM", **change: Any) -> Any:
    """A model in fp64, in training mode, with weights that make every part of it count.

    Args:
        head: of the AutoModelFor class that makes it; empty for AutoModel.
    """
    import transformers

    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    config = config_of(kind, **change)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation="eager").double()
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.train()
