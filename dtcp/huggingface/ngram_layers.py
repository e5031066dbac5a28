"""Layers of transformers that look up n-grams and convolve their embeddings: Qwen4's PLE.

A token reads the ids of the tokens before it, and then features of tokens at a distance. The
forward is rewritten, by the name of the class, with both as convolutions over the document.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dtcp.huggingface.attend_by_name import check_no_cache
from dtcp.huggingface.recurrent_kernels import causal_conv1d_fn, ids_before


def _qwen4_exp(
    self: Any,
    hidden_states: Tensor,
    input_ids: Tensor,
    cache: Any = None,
    *,
    attn_metadata: Any,
    **_: Any,
) -> Tensor:
    """Qwen4ExpTextPLELayer, whose module of n-grams keeps the ids of a cache."""
    check_no_cache(self, {"cache": cache})
    table, streams = self.ple_embedding, (self.hc_count, self.hidden_size)
    ids, end = input_ids.long(), table.eos_token_id
    before = ids_before(ids, table.ngram_size - 1, end, attn_metadata=attn_metadata)
    ngrams = _ngram_ids(table, ids, before)
    embedded = table.ngram_embedding(ngrams).flatten(-2)
    key = self.norm_key(self.key_proj(embedded)).unflatten(-1, streams)
    query = self.norm_query(hidden_states).unflatten(-1, streams)
    gate = (key * query).sum(dim=-1, keepdim=True) / math.sqrt(self.hidden_size)
    gate = gate.abs().clamp_min(1e-6).sqrt() * gate.sign()
    value = (torch.sigmoid(gate) * self.value_proj(embedded).unsqueeze(-2)).flatten(-2)
    convolved = causal_conv1d_fn(
        self.norm_conv(value).transpose(1, 2),
        self.conv1d.weight.squeeze(1),
        activation="silu",
        dilation=table.ngram_size,
        attn_metadata=attn_metadata,
    )
    return value + convolved.transpose(1, 2)


def _ngram_ids(table: Any, ids: Tensor, before: Tensor) -> Tensor:
    """The row of each n-gram, for each hash of each order: [B, L, (N - 1) * heads].

    Args:
        before: [B, L, N - 1], ids of the tokens before, that of the next one first.
    """
    end, heads = table.eos_token_id, table.heads_per_ngram
    # Nothing is read from before the end of an earlier text.
    before = torch.where((before != end).cumprod(-1).bool(), before, end)
    first, *factors = table.layer_multipliers.unbind()
    mixed, rows = ids * first, []
    for order, (token, factor) in enumerate(zip(before.unbind(-1), factors, strict=True)):
        mixed = mixed ^ (token * factor)
        mine = slice(order * heads, (order + 1) * heads)
        row = mixed[..., None] % table.ngram_heads_vocab_sizes[mine]
        rows.append(row + table.ngram_heads_offsets[mine])
    return torch.cat(rows, dim=-1)


NGRAM_LAYERS: Mapping[str, Any] = {"Qwen4ExpTextPLELayer": _qwen4_exp}
"""By the name of the class."""
