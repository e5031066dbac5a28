"""transformers' Qwen3.5 as the oracle: in true fp64, document by document."""

import importlib
from typing import Any

import torch
from torch import Tensor

from dtcp.check.true_fp64 import TrueFP64
from dtcp.huggingface.plain_torch import without_gpu_kernels
from dtcp.models.qwen3_5 import Qwen35Config, config_to_hf


def modeling(folder: str) -> Any:
    """The modeling module of a folder of transformers, on torch's own operations."""
    from transformers.utils import import_utils

    with without_gpu_kernels():
        import_utils.is_flash_linear_attention_available.cache_clear()
        return importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")


def build(config: Qwen35Config) -> Any:
    """Their model of our config, in fp64, with weights that make every part of it count."""
    experts = not isinstance(config.feed_forward, int)
    module = modeling("qwen3_5_moe" if experts else "qwen3_5")
    kind = "Qwen3_5Moe" if experts else "Qwen3_5"
    settings = config_to_hf(config)
    hf_config = getattr(module, f"{kind}TextConfig")(**settings)
    hf_config._attn_implementation, hf_config._experts_implementation = "eager", "eager"
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(module, f"{kind}ForCausalLM")(hf_config).double()
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.5
            parameter.add_(scale * torch.randn_like(parameter))
            if name.endswith("A_log"):
                parameter.uniform_(-3, 1)
    position_ids = model.model.rotary_emb
    angles = position_ids.forward

    def in_fp32(*args: Any, **kwargs: Any) -> Any:
        # Ours are fp32 too, in every dtype of the model.
        with torch._C.DisableTorchFunction():
            return angles(*args, **kwargs)

    position_ids.forward = in_fp32
    return model.train()


def logits(model: Any, input_ids: Tensor, rows: Any, position_ids: Tensor | None = None) -> Tensor:
    """Score whole rows document by document: [B, S, V], zero for padding.

    Args:
        position_ids: [3, B, S]; None for text.
    """
    out = []
    with TrueFP64():
        for row, lengths in enumerate(rows):
            parts, end = [], 0
            for length in lengths:
                tokens = (slice(row, row + 1), slice(end, end + length))
                where = None if position_ids is None else position_ids[:, tokens[0], tokens[1]]
                parts.append(model(input_ids[tokens], position_ids=where, use_cache=False).logits)
                end += length
            missing = input_ids.shape[1] - end
            padding = parts[0].new_zeros(1, missing, parts[0].shape[-1])
            out.append(torch.cat((*parts, padding), dim=1))
    return torch.cat(out)
