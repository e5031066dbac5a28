"""Attention of transformers to the tokens that an indexer picks: DeepSeek-V3.2's and its like.

Their forward turns what was picked into a mask of all pairs of tokens. It is rewritten up to the
calls of the indexer's mixer and of attention, which reads the latents of what was picked. Families
differ in how they make queries, latents and a gate (picking_forms.py), not in what they pick.
"""

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from dtcp.autocast import as_autocast_casts
from dtcp.huggingface.attend_by_name import ROPE, attend_by_name, check_no_cache
from dtcp.huggingface.picking_forms import FORM, FORMS, INDEX_ROPE, PickingForm
from dtcp.kernels.dtypes import accumulation

Latents = MutableMapping[str, tuple[Tensor, Tensor]]
"""Latents that other layers read, [B, 1, L, C], and rotated rotary keys, by kind."""

Tables = tuple[Tensor, ...]
"""Cosines and sines of positions; nothing where no channel is turned."""

OWN_INDEXER, INDEXER = "indexer", "dtcp_indexer"
"""Names in the attention module: of the model's own indexer, and of its mixer."""


def _attend_to_picked(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    prev_topk_indices: Tensor | None = None,
    shared_kv_states: Latents | None = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    check_no_cache(self, kwargs)
    form, tables = getattr(self, FORM), position_embeddings or ()
    if form.pools:
        # A padding mask, [B, L]: the model makes one of ones if it is given none.
        attention_mask = None
    residual, q, gate = form.queries(self, hidden_states)
    if form.scales_queries:
        q = self.softmax_scaling(q, position_ids, head_dim_first=False)
    q, k, v = _queries_and_latents(self, hidden_states, q, tables, shared_kv_states)
    metadata, selected = kwargs.get("attn_metadata"), prev_topk_indices
    if self.indexer is not None:
        at = tables, position_ids
        selected = _picked(self, hidden_states, residual, *at, metadata)
    kwargs |= _arguments(self, selected)
    out = attend_by_name(self, q, k, v, attention_mask, **kwargs)
    if gate is not None:
        out = (out.unflatten(-1, (*gate.shape[2:3], -1)) * gate).to(out.dtype).flatten(2)
    out = self.o_proj(out)
    return (out, None, selected) if form.hands_on else (out, None)


def _queries_and_latents(
    module: Any, hidden_states: Tensor, q: Tensor, tables: Tables, shared: Latents | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, L, D] of [B, L, H, D]; and keys and values, as `expand_kv` says."""
    form: PickingForm = getattr(module, FORM)
    widths = module.qk_nope_head_dim, module.qk_rope_head_dim
    content, q_rotary = q.transpose(1, 2).split(widths, dim=-1)
    kind = "rope" if widths[1] else "nope"
    if shared is not None and module.is_kv_shared_layer:
        latent, key_rotary = shared[kind]
        if widths[1]:
            q_rotary = getattr(module, ROPE)(q_rotary, None, *tables)[0]
    else:
        rows = module.kv_a_proj_with_mqa(hidden_states)[:, None]
        latent, key_rotary = form.latents(module, rows)
        dtypes = q_rotary.dtype, key_rotary.dtype
        if widths[1]:
            q_rotary, key_rotary = getattr(module, ROPE)(q_rotary, key_rotary, *tables)
        if form.wide_tables:
            q_rotary, key_rotary = q_rotary.to(dtypes[0]), key_rotary.to(dtypes[1])
    if shared is not None and module.store_full_length_kv:
        shared[kind] = latent, key_rotary
    k, v = module.expand_kv(latent, key_rotary)
    return torch.cat((content, q_rotary), dim=-1), k, v


def _picked(
    module: Any,
    hidden_states: Tensor,
    residual: Tensor,
    tables: Tables,
    position_ids: Tensor | None,
    attn_metadata: Any,
) -> Tensor | None:
    """Which tokens queries read, of the module's indexer: [B, L, k].

    None where the module has no mixers, while it is surveyed.
    """
    mixer = getattr(module, INDEXER, None)
    operands: tuple[Tensor, ...]
    operands = _index_operands(module, hidden_states, residual, tables, position_ids)
    if getattr(module, FORM).pools:
        operands += _pool_weights(module.indexer, hidden_states)
    if mixer is None:
        return None
    return mixer(*operands, attn_metadata)


def _index_operands(
    module: Any,
    hidden_states: Tensor,
    residual: Tensor,
    tables: Tables,
    position_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, L, H, D], a weight for each, scaled, and keys [B, L, D] of an indexer."""
    indexer = module.indexer
    scales_queries = getattr(module, FORM).scales_queries
    with torch.no_grad():
        residual = indexer.q_input_norm(residual) if scales_queries else residual
        q = indexer.wq_b(residual).unflatten(-1, (-1, indexer.head_dim))
        if scales_queries:
            q = indexer.softmax_scaling(q, position_ids, head_dim_first=False)
        # transformers may keep the norm in fp32 where the other layers are fp16.
        key = indexer.wk(hidden_states).to(indexer.k_norm.weight.dtype)
        key = indexer.k_norm(key).to(hidden_states.dtype)
        key = key[:, :, None]
        if module.qk_rope_head_dim:
            q, key = _turned_index(module, q, key, tables)
        # Norms and rotary tables give fp32 under autocast; scores are then products of its dtype.
        q, cast = as_autocast_casts(q, key)
        # Pooled before they are.
        key = key if getattr(module, FORM).pools else cast
        # transformers may keep this one in fp32, too.
        weight = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype))
        weight = weight.to(accumulation(weight.dtype))
        # Of products and of heads; both are positive, so that relu may come first.
        weight = weight * (indexer.softmax_scale * indexer.n_heads**-0.5)
    return q, weight, key[:, :, 0]


@torch.no_grad()
def _pool_weights(indexer: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """By what an indexer weighs the keys of a pool: per token [B, L, D], per place [N, D]."""
    made = indexer.index_kpool_compress_gate, indexer.index_kpool_compress_ape
    of_tokens, of_places = (x.to_local() if isinstance(x, DTensor) else x for x in made)
    return F.linear(hidden_states, of_tokens), of_places


def _turned_index(module: Any, q: Tensor, key: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Queries and keys of an indexer, turned by positions in some of their channels."""
    indexer, last = module.indexer, getattr(module, FORM).index_rotary_last
    rotary = indexer.qk_rope_head_dim
    widths = (indexer.head_dim - rotary, rotary) if last else (rotary, indexer.head_dim - rotary)
    of_q, of_key = q.split(widths, dim=-1), key.split(widths, dim=-1)
    turned = getattr(module, INDEX_ROPE)(of_q[last], of_key[last], *tables, unsqueeze_dim=2)
    parts = ((of_q[0], turned[0]), (of_key[0], turned[1]))
    if not last:
        parts = ((turned[0], of_q[1]), (turned[1], of_key[1]))
    return torch.cat(parts[0], dim=-1), torch.cat(parts[1], dim=-1)


def _arguments(module: Any, selected: Tensor | None) -> dict[str, Any]:
    """What attention is called with."""
    number = 0
    if module.indexer is not None:
        number = module.indexer.index_topk
    elif getattr(module, FORM).hands_on:
        number = module.config.index_topk
    pooled = None
    if getattr(module, FORM).pools:
        pooled = module.config.index_kpool, module.config.index_kpool_always_select_tail
    return {
        "pooled": pooled,
        "selected": selected,
        "num_selected": number,
        "scaling": module.scaling,
        "dropout": module.attention_dropout if module.training else 0.0,
        "s_aux": getattr(module, "sinks", None),
    }


PICKING: Mapping[str, Callable[..., Any]] = dict.fromkeys(FORMS, _attend_to_picked)
"""By the name of the class."""
