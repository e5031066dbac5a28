"""How families whose indexers pick tokens make queries, latents and gates from a layer's input.

                    queries of                           beside              rotary channels: index
    DeepSeek-V3.2   the residual                                             halves, first
    GLM-5           the residual                         shared choices      pairs, first
    A.X-K2          residual and what it was normed of   a gate per channel  halves, first
    HY-V4           the residual                         shared choices,     halves, last
                                                         a gate per channel
                                                         of tokens, sinks
    Dots 3 Note     the residual, scaled                 a gate per head,    pairs, first
                                                         normed rotary keys
    Mistral Large 4 hidden states, scaled by positions   shared choices,     pairs, first
                                                         shared latents
    GLM-5-Next      the residual                         shared choices,     none
                                                         pools of tokens

The residual is the normed latent of a query, [B, L, Cq], of which indexers make theirs, too; of
Mistral Large 4, whose queries have none, the hidden states, which its indexers norm themselves.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.huggingface.attend_by_name import ROPE

FORM, INDEX_ROPE = "dtcp_form", "dtcp_index_rope"
"""Where a module keeps its form, and the function that turns queries and keys of its indexer."""
_HALVES, _PAIRS = "apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave"
"""The functions that turn by positions, by their names in the models' own files."""

Queries = tuple[Tensor, Tensor, Tensor | None]
"""The residual [B, L, Cq]; q [B, L, H, N + R]; and a gate [B, L, H, V or 1], of any dtype."""


def _plain_queries(module: Any, hidden_states: Tensor) -> Queries:
    residual = module.q_a_layernorm(module.q_a_proj(hidden_states))
    return residual, _by_heads(module.q_b_proj(residual), module.qk_head_dim), None


def _axk2_queries(module: Any, hidden_states: Tensor) -> Queries:
    widths = module.qk_head_dim, module.v_head_dim
    compressed = module.q_a_proj(hidden_states)
    residual = module.q_a_layernorm(compressed)
    both = module.q_gate_proj(torch.cat((residual, compressed), dim=-1))
    q, gate = _by_heads(both, sum(widths)).split(widths, dim=-1)
    return residual, q, torch.sigmoid(gate.float())


def _hy_v4_queries(module: Any, hidden_states: Tensor) -> Queries:
    residual, q, _ = _plain_queries(module, hidden_states)
    gate = _by_heads(module.gate_proj(hidden_states), module.gate_projection_size)
    return residual, q, torch.sigmoid(gate)


def _dots3_queries(module: Any, hidden_states: Tensor) -> Queries:
    residual = module.q_a_layernorm(module.q_a_proj(hidden_states)) * module.q_lora_scale
    gate = module.g_proj(hidden_states)[..., None].sigmoid()
    return residual, _by_heads(module.q_b_proj(residual), module.qk_head_dim), gate


def _mistral_queries(module: Any, hidden_states: Tensor) -> Queries:
    return hidden_states, _by_heads(module.q_proj(hidden_states), module.qk_head_dim), None


def _by_heads(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width))


def _plain_latents(module: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1, L, C + R] -> the latent, normed, and the rotary key, not turned yet."""
    latent, key_rotary = rows.split((module.kv_lora_rank, module.qk_rope_head_dim), dim=-1)
    return module.kv_a_layernorm(latent), key_rotary


def _dots3_latents(module: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    latent, key_rotary = _plain_latents(module, rows)
    return latent * module.kv_lora_scale, module.k_rope_only_layernorm(key_rotary)


@dataclass(frozen=True)
class PickingForm:
    """What differs between families.

    Args:
        rope, index_rope: names of the functions that turn queries and keys, and the indexer's.
        index_rotary_last: whether an indexer turns its last channels; else its first.
        scales_queries: whether queries, of indexers, too, are scaled by their positions.
        hands_on: whether a layer without an indexer reads what one before it picked.
        wide_tables: whether rotary tables are fp32 whatever the model computes in.
        pools: whether an indexer picks pools of tokens; its layers are given no mask of pairs.
    """

    queries: Callable[[Any, Tensor], Queries] = _plain_queries
    latents: Callable[[Any, Tensor], tuple[Tensor, Tensor]] = _plain_latents
    rope: str = _PAIRS
    index_rope: str = _HALVES
    index_rotary_last: bool = False
    scales_queries: bool = False
    hands_on: bool = False
    wide_tables: bool = False
    pools: bool = False


_HY_V4 = PickingForm(_hy_v4_queries, rope=_HALVES, index_rotary_last=True, hands_on=True)

FORMS: Mapping[str, PickingForm] = {
    "DeepseekV32Attention": PickingForm(),
    "GlmMoeDsaAttention": PickingForm(index_rope=_PAIRS, hands_on=True),
    "AXK2Attention": PickingForm(_axk2_queries),
    "HYV4Attention": _HY_V4,
    "HYV4VLAttention": _HY_V4,
    "Dots3NoteTextAttention": PickingForm(
        _dots3_queries, _dots3_latents, index_rope=_PAIRS, wide_tables=True
    ),
    "Glm5NextTextAttention": PickingForm(hands_on=True, pools=True),
    "MistralLarge4TextAttention": PickingForm(
        _mistral_queries, index_rope=_PAIRS, scales_queries=True, hands_on=True
    ),
}
"""By the name of the class."""


def own_values_of_picking(module: nn.Module) -> dict[str, Any]:
    """A module's form, and the functions of its own file that turn by positions.

    Somebody else's class of this name may have none; a survey says that it cannot be run.
    """
    form, there = FORMS[type(module).__name__], inspect.getmodule(type(module))
    names = {ROPE: form.rope, INDEX_ROPE: form.index_rope}
    return {FORM: form, **{key: getattr(there, name, None) for key, name in names.items()}}
