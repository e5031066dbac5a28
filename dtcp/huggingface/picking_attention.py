"""Attention of transformers to the tokens that an indexer picks: DeepSeek-V3.2's and GLM-5's.

Their forward makes a mask of all pairs of tokens of what was picked. It is written again, up to the
calls of the indexer's mixer and of attention, which reads the latents of what was picked.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.autocast import as_autocast_casts
from dtcp.huggingface.attend_by_name import ROPE, attend_by_name, check_no_cache
from dtcp.kernels.dtypes import accumulation

OWN_INDEXER, INDEXER = "indexer", "dtcp_indexer"
"""Names in the attention module: of the model's own indexer, and of its mixer."""
_INDEX_ROPE = "dtcp_index_rope"
_ROPES: Mapping[str, str] = {
    "DeepseekV32Attention": "apply_rotary_pos_emb",
    "GlmMoeDsaAttention": "apply_rotary_pos_emb_interleave",
}
"""What turns queries and keys of the indexer, by the class of the attention module."""


def own_values_of_picking(module: nn.Module) -> dict[str, Any]:
    """The functions of the module's own file that turn by positions: attention's, the indexer's.

    Somebody else's class of this name may have none; a survey says that it cannot be run.
    """
    names = {ROPE: "apply_rotary_pos_emb_interleave", _INDEX_ROPE: _ROPES[type(module).__name__]}
    there = inspect.getmodule(type(module))
    return {key: getattr(there, name, None) for key, name in names.items()}


def _deepseek_v32(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Any = None,
    past_key_values: Any = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    check_no_cache(self, past_key_values)
    residual, q, k, v = _queries_and_latents(self, hidden_states, position_embeddings)
    metadata = kwargs.get("attn_metadata")
    selected = _picked(self, hidden_states, residual, position_embeddings, None, metadata)
    kwargs |= _arguments(self, selected)
    return self.o_proj(attend_by_name(self, q, k, v, attention_mask, **kwargs)), None


def _glm_moe_dsa(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Any = None,
    past_key_values: Any = None,
    position_ids: Tensor | None = None,
    prev_topk_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None, Tensor | None]:
    check_no_cache(self, past_key_values)
    residual, q, k, v = _queries_and_latents(self, hidden_states, position_embeddings)
    metadata, before = kwargs.get("attn_metadata"), prev_topk_indices
    selected = _picked(self, hidden_states, residual, position_embeddings, before, metadata)
    kwargs |= _arguments(self, selected)
    out = attend_by_name(self, q, k, v, attention_mask, **kwargs)
    return self.o_proj(out), None, selected


def _queries_and_latents(
    module: Any, hidden_states: Tensor, tables: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What queries are made of, [B, L, Cq]; queries; and keys and values, as `expand_kv` says."""
    residual = module.q_a_layernorm(module.q_a_proj(hidden_states))
    q = module.q_b_proj(residual).unflatten(-1, (-1, module.qk_head_dim)).transpose(1, 2)
    q, q_rotary = q.split((module.qk_nope_head_dim, module.qk_rope_head_dim), dim=-1)
    rows = module.kv_a_proj_with_mqa(hidden_states)[:, None]
    latent, key_rotary = rows.split((module.kv_lora_rank, module.qk_rope_head_dim), dim=-1)
    q_rotary, key_rotary = getattr(module, ROPE)(q_rotary, key_rotary, *tables)
    k, v = module.expand_kv(module.kv_a_layernorm(latent), key_rotary)
    return residual, torch.cat((q, q_rotary), dim=-1), k, v


def _picked(
    module: Any,
    hidden_states: Tensor,
    residual: Tensor,
    tables: tuple[Tensor, Tensor],
    before: Tensor | None,
    attn_metadata: Any,
) -> Tensor | None:
    """Which tokens queries read: [B, L, k], of the module's indexer or of one before it.

    None where the module has no mixers, while it is surveyed.
    """
    if module.indexer is None:
        return before
    operands = _index_operands(
        module.indexer, getattr(module, _INDEX_ROPE), hidden_states, residual, tables
    )
    mixer = getattr(module, INDEXER, None)
    if mixer is None:
        return None
    selected: Tensor = mixer(*operands, attn_metadata)
    return selected


def _index_operands(
    indexer: Any,
    rope: Callable[..., tuple[Tensor, Tensor]],
    hidden_states: Tensor,
    residual: Tensor,
    tables: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, L, H, D], a weight for each, scaled, and keys [B, L, D] of an indexer."""
    widths = indexer.qk_rope_head_dim, indexer.head_dim - indexer.qk_rope_head_dim
    with torch.no_grad():
        q = indexer.wq_b(residual).unflatten(-1, (-1, indexer.head_dim))
        key = indexer.k_norm(indexer.wk(hidden_states))[:, :, None]
        (q_rotary, q), (key_rotary, key) = (x.split(widths, dim=-1) for x in (q, key))
        q_rotary, key_rotary = rope(q_rotary, key_rotary, *tables, unsqueeze_dim=2)
        q, key = torch.cat((q_rotary, q), dim=-1), torch.cat((key_rotary, key), dim=-1)
        # Norms and rotary tables give fp32 under autocast; scores are then products of its dtype.
        q, key = as_autocast_casts(q, key)
        # transformers keeps this layer in fp32 where the others are fp16.
        weight = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype))
        weight = weight.to(accumulation(weight.dtype))
        # Of products and of heads; both are positive, so that relu may come first.
        weight = weight * (indexer.softmax_scale * indexer.n_heads**-0.5)
    return q, weight, key[:, :, 0]


def _arguments(module: Any, selected: Tensor | None) -> dict[str, Any]:
    """What attention is called with."""
    return {
        "selected": selected,
        "num_selected": module.config.index_topk,
        "scaling": module.scaling,
        "dropout": module.attention_dropout if module.training else 0.0,
    }


PICKING: Mapping[str, Callable[..., Any]] = {
    "DeepseekV32Attention": _deepseek_v32,
    "GlmMoeDsaAttention": _glm_moe_dsa,
}
"""By the name of the class."""
