"""Attention of transformers to a window of keys and to compressed entries: DeepSeek-V4's.

Its compressors pool windows of the whole row, wherever documents start in it, and make a mask of
all pairs of query and entry. Their forwards are rewritten to return what is to be pooled: the mixer
pools it, counting windows from the start of each document, and reads what the indexer picks.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtcp.huggingface.attend_by_name import ROPE, attend_by_name, check_no_cache
from dtcp.kernels.dtypes import accumulation
from dtcp.metadata import BatchMetadata
from dtcp.sequence.masks import And, Causal, Mask, SlidingWindow
from dtcp.sparse.mixer import CompressedSparseAttention, Compression, Index, Prepool

OVERLAPPING = "DeepseekV4CSACompressor"
"""The class of compressors that pool the window before, too, and that have an indexer."""


class Compressed(NamedTuple):
    """What a module reads beside a window of keys; empty in layers with a window only."""

    position_ids: Tensor  # [B or 1, L], by which queries and keys were turned
    compression: Compression | None = None
    tokens: Prepool | None = None
    picked_by: Index | None = None


def attend_beside_entries(
    mixer: CompressedSparseAttention,
    q: Tensor,
    keys: Tensor,
    sink: Any,
    compressed: Compressed,
    attn_metadata: BatchMetadata,
) -> Tensor:
    """Attend by a module's mixer: q [B, L, H, D], keys [B, L, D] -> [B, L, H, D]."""
    mixer.check_position_ids(compressed.position_ids, attn_metadata)
    parts: dict[str, Any] = {"tokens": compressed.tokens, "index": compressed.picked_by}
    return mixer(q, keys, attn_metadata, sink=sink, **parts)


def window_of(mask: Mask) -> int:
    """Keys that a query sees, its own included, under the mask of a window; 0 under others."""
    right = mask.right if isinstance(mask, And) else None
    is_window = isinstance(right, SlidingWindow) and mask == Causal() & SlidingWindow(right.size)
    return right.size if isinstance(right, SlidingWindow) and is_window else 0


def compression_of(compressor: Any) -> Compression | None:
    """How a compressor makes entries from tokens; None without one."""
    if compressor is None:
        return None
    if type(compressor).__name__ != OVERLAPPING:
        return Compression(compressor.compress_rate)
    selected = compressor.indexer.index_topk
    return Compression(compressor.compress_rate, overlap=True, selected=selected)


def _deepseek_v4(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Mapping[str, tuple[Tensor, Tensor]],
    position_ids: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    check_no_cache(self, kwargs)
    cos, sin = position_embeddings[self.rope_layer_type]
    rope, compressor = getattr(self, ROPE), self.compressor
    residual = self.q_a_norm(self.q_a_proj(hidden_states))
    q = self.q_b_norm(self.q_b_proj(residual).unflatten(-1, (-1, self.head_dim)))
    q = rope(q, cos, sin, unsqueeze_dim=2).transpose(1, 2)
    keys = rope(self.kv_norm(self.kv_proj(hidden_states))[:, None], cos, sin)
    compressed = Compressed(position_ids)
    if compressor is not None:
        parts = compressor(hidden_states, residual, position_ids)
        compressed = Compressed(position_ids, compression_of(compressor), *parts)
    arguments = {
        "scaling": self.scaling,
        "dropout": self.attention_dropout if self.training else 0.0,
        "s_aux": self.sinks,
        "compressed": compressed,
    }
    out = attend_by_name(self, q, keys, keys, attention_mask, **arguments, **kwargs)
    # Values are keys, which were rotated.
    out = rope(out.unflatten(-1, (-1, self.head_dim)), cos, -sin, unsqueeze_dim=2)
    grouped = out.flatten(2).unflatten(-1, (self.config.o_groups, -1))
    return self.o_b_proj(self.o_a_proj(grouped).flatten(2)), None


def _compressor(
    self: Any, hidden_states: Tensor, residual: Tensor, position_ids: Tensor
) -> tuple[Prepool, Index | None]:
    """Of either kind of compressor: the tokens to pool, and what its indexer picks entries by."""
    tokens = _to_pool(self, hidden_states)
    indexer = getattr(self, "indexer", None)
    return tokens, None if indexer is None else indexer(hidden_states, residual, position_ids)


def _indexer(self: Any, hidden_states: Tensor, residual: Tensor, position_ids: Tensor) -> Index:
    with torch.no_grad():
        tables = self.rotary_emb(
            hidden_states, position_ids=position_ids, layer_type=self.rope_layer_type
        )
        q = self.q_b_proj(residual).unflatten(-1, (-1, self.head_dim))
        q = getattr(self, ROPE)(q, *tables, unsqueeze_dim=2)
        weight = self.scorer.weights_proj(hidden_states)
        weight = weight.to(accumulation(weight.dtype))
        # Of products and of heads; both are positive, so that relu may come first.
        weight = weight * (self.scorer.softmax_scale * self.scorer.weights_scaling)
        return Index(q, weight, _to_pool(self, hidden_states))


def _to_pool(module: Any, hidden_states: Tensor) -> Prepool:
    projected = module.kv_proj(hidden_states), module.gate_proj(hidden_states)
    return Prepool(*projected, module.position_bias, partial(_finished, module))


def _finished(module: Any, pooled: Tensor, position_ids: Tensor) -> Tensor:
    """Pooled windows, [B, E, D], normalized and rotated by their first tokens' positions."""
    entries = module.kv_norm(pooled)
    kind = module.rope_layer_type
    tables = module.rotary_emb(entries, position_ids=position_ids, layer_type=kind)
    turned: Tensor = getattr(module, ROPE)(entries[:, None], *tables)
    return turned[:, 0]


COMPRESSED: Mapping[str, Callable[..., Any]] = {
    "DeepseekV4Attention": _deepseek_v4,
    OVERLAPPING: _compressor,
    "DeepseekV4HCACompressor": _compressor,
    "DeepseekV4Indexer": _indexer,
}
"""By the name of the class."""
