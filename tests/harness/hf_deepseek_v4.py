"""transformers' DeepSeek-V4 as the truth: small, in fp64, one document at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dtcp.models.deepseek_v4 import from_hf
from dtcp.sequence.documents import Documents

SETTINGS: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
    ],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
    "num_hash_layers": 2,
    "sliding_window": 8,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 4,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 3,
    "swiglu_limit": 0.5,
    "num_nextn_predict_layers": 0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def build(**change: Any) -> Any:
    """A random model in fp64, with weights that make every part of it count."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config(
        **{**SETTINGS, **change}, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = DeepseekV4ForCausalLM(config).double()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif parameter.ndim == 1 or "position_bias" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
            if name.endswith("tid2eid"):
                first = torch.randint(config.n_routed_experts, buffer.shape[:1])
                buffer.copy_((first[:, None] + torch.arange(2)) % config.n_routed_experts)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "DeepseekV4RMSNorm":
            # Theirs computes in fp32 whatever the dtype of its input.
            norm = nn.RMSNorm(len(module.weight), config.rms_norm_eps, dtype=torch.float64)
            norm.load_state_dict(module.state_dict())
            model.set_submodule(name, norm)
        for inner in ("main_inv_freq", "compress_inv_freq"):
            if inner in module._buffers:
                module._buffers[inner] = getattr(module, inner.replace("_inv", "_original_inv"))
    return model.train()


@contextmanager
def in_fp64() -> Iterator[None]:
    """Inside, what transformers casts to fp32 by hand stays in fp64; angles are fp32, as ours."""
    to_float, softmax = Tensor.float, Tensor.softmax

    def stay(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else to_float(x)

    def wide(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim, dtype=torch.float64 if x.dtype == torch.float64 else dtype)

    with mock.patch.object(Tensor, "float", stay), mock.patch.object(Tensor, "softmax", wide):
        yield


def one_by_one(model: Any, input_ids: Tensor, documents: Documents) -> Tensor:
    """Logits of a model that is shown each document alone, 0 in padding: [B, S, V]."""
    rows = []
    with in_fp64():
        for row, lengths in zip(input_ids, documents.lengths, strict=True):
            shown = row[: sum(lengths)].split(lengths)
            logits = torch.cat([model(ids[None], use_cache=False).logits[0] for ids in shown])
            rows.append(nn.functional.pad(logits, (0, 0, 0, len(row) - len(logits))))
    return torch.stack(rows)


class WithPrediction(nn.Module):
    """The published model and, of its parts, what predicts the token after the next one.

    transformers leaves multi-token prediction out. The streams of the last layer and the next
    token's embedding, both normalized and projected, go through a layer, a head and a norm of
    their own; embedding and language-model head are the model's.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        dim, eps = model.config.hidden_size, model.config.rms_norm_eps
        self.model, self.layers = model, model.model.layers[:-1]
        self.parts = nn.ModuleDict(
            {
                "token_norm": nn.RMSNorm(dim, eps),
                "token_proj": nn.Linear(dim, dim, bias=False),
                "stream_norm": nn.RMSNorm(dim, eps),
                "stream_proj": nn.Linear(dim, dim, bias=False),
                "block": model.model.layers[-1],
                "head": type(model.model.hc_head)(model.config),
                "norm": nn.RMSNorm(dim, eps),
            }
        ).double()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(2)
            for name, parameter in self.parts.named_parameters():
                if not name.startswith("block."):
                    parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        model.model.layers = self.layers

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the next token, and of the one after it, for one document [1, S]."""
        seen: dict[str, Any] = {}

        def keep(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
            seen.update(kwargs, streams=out)

        hook = self.layers[-1].register_forward_hook(keep, with_kwargs=True)
        logits = self.model(input_ids, use_cache=False).logits
        hook.remove()
        parts, streams = self.parts, seen.pop("streams")
        seen["input_ids"] = nn.functional.pad(input_ids[:, 1:], (0, 1))
        token = self.model.model.embed_tokens(seen["input_ids"])
        token = parts["token_proj"](parts["token_norm"](token))[:, :, None]
        x = token + parts["stream_proj"](parts["stream_norm"](streams))
        x = parts["norm"](parts["head"](parts["block"](x, **seen)))
        return logits, self.model.lm_head(x)


def in_our_names(weights: dict[str, Tensor], config: Any, depth_block: int) -> dict[str, Tensor]:
    """Parameters (or gradients) of WithPrediction, for our model with one MTP layer."""
    base = {n.removeprefix("model."): x for n, x in weights.items() if n.startswith("model.")}
    block = {
        n.replace("parts.block.", f"model.layers.{depth_block}."): x
        for n, x in weights.items()
        if n.startswith("parts.block.")
    }
    ours = from_hf(base, config)
    for name, x in from_hf(block, config).items():
        ours[name.replace(f"layers.{depth_block}.", "mtp.0.block.")] = x
    for name, x in weights.items():
        if name.startswith("parts.") and not name.startswith("parts.block."):
            ours[name.replace("parts.", "mtp.0.").replace("head.hc_", "head.")] = x
    return ours
