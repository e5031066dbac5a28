"""Attention of transformers to the tokens of blocks that an indexer picks: Qwen4's.

Its indexer loops over queries, and makes a mask of all pairs of tokens of what it picked. Both
forwards are written again, up to what blocks are picked by.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtcp.autocast import as_autocast_casts
from dtcp.huggingface.attend_by_name import ROPE, attend_by_name, check_no_cache
from dtcp.sparse_blocks import BlockIndex


class PickedBlocks(NamedTuple):
    """What a call of attention says of the blocks that it reads."""

    num_blocks: int
    block_len: int
    picked_by: BlockIndex


def _attend_to_blocks(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Qwen4ExpTextAttention."""
    check_no_cache(self, kwargs)
    projections = self.q_proj, self.k_proj, self.v_proj
    q, k, v = (x(hidden_states).unflatten(-1, (-1, self.head_dim)) for x in projections)
    q, gate = q.unflatten(2, (-1, 2)).unbind(3)
    q, k, v = (x.transpose(1, 2) for x in (self.q_norm(q), self.k_norm(k), v))
    q, k = getattr(self, ROPE)(q, k, *position_embeddings)
    arguments = {
        "scaling": self.scaling,
        "dropout": self.attention_dropout if self.training else 0.0,
        "picked_blocks": self.indexer(hidden_states, position_embeddings),
    }
    out = attend_by_name(self, q, k, v, attention_mask, **arguments, **kwargs)
    return self.o_proj(out * torch.sigmoid(gate.flatten(2))), None


def _indexer(
    self: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> PickedBlocks:
    """Qwen4ExpTextQSAIndexer."""
    with torch.no_grad():
        both = self.index_qk_proj(hidden_states).unflatten(-1, (-1, self.index_head_dim))
        q, key = both.split((self.index_n_heads, self.index_kv_heads), dim=2)
        cos, sin = position_embeddings
        q = getattr(self, ROPE)(self.q_layernorm(q), cos=cos, sin=sin, unsqueeze_dim=2)
        # Norms and rotary tables give fp32 under autocast; scores are then products of its dtype.
        q, key = as_autocast_casts(q, key[:, :, 0])
        table = torch.cat((_half(cos), _half(sin)), dim=-1)
        index = BlockIndex(q, key, table, partial(_finished, self))
    return PickedBlocks(self.block_topk, self.compress_ratio, index)


def _half(table: Tensor) -> Tensor:
    """The first half of a rotary table, whose second one is the same."""
    return table[..., : table.shape[-1] // 2]


def _finished(indexer: Any, mean: Tensor, table: Tensor) -> Tensor:
    """Means of keys, [B, P, D], normalized and turned as their first tokens are."""
    cos, sin = (torch.cat((half, half), dim=-1) for half in table.chunk(2, dim=-1))
    keys = indexer.k_layernorm(mean)[:, None]
    turned: Tensor = getattr(indexer, ROPE)(keys, cos=cos, sin=sin)
    return turned[:, 0]


BLOCKS: Mapping[str, Callable[..., Any]] = {
    "Qwen4ExpTextAttention": _attend_to_blocks,
    "Qwen4ExpTextQSAIndexer": _indexer,
}
"""By the name of the class."""
