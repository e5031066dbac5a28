"""Attention of transformers to the tokens of blocks that an indexer picks: Qwen4's, MiniMax-M3's.

Indexers loop over queries, or score all pairs of tokens, and what they pick becomes a mask of all
pairs. Their forwards are rewritten to return what blocks are picked by; of attention, only Qwen4's,
since MiniMax-M3's passes on what its indexer gives.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtcp.autocast import as_autocast_casts
from dtcp.huggingface.attend_by_name import ROPE, attend_by_name, check_no_cache
from dtcp.sparse_blocks import BlockIndex, ScoredBlockAttention, ScoreIndex, SparseBlockAttention

BLOCK_INDICES = "block_indices"
"""The argument of a call of attention that says which blocks it reads, as MiniMax-M3 calls it."""


class PickedBlocks(NamedTuple):
    """What an attention call says about the blocks that it reads.

    Args:
        kind: the class of the mixer.
        numbers: its constructor's arguments.
        picked_by: what it picks blocks by, in each call.
    """

    kind: type[SparseBlockAttention]
    numbers: tuple[int, ...]
    picked_by: BlockIndex | ScoreIndex


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
        BLOCK_INDICES: self.indexer(hidden_states, position_embeddings),
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
    return PickedBlocks(SparseBlockAttention, (self.block_topk, self.compress_ratio), index)


def _half(table: Tensor) -> Tensor:
    """The first half of a rotary table, whose second one is the same."""
    return table[..., : table.shape[-1] // 2]


def _finished(indexer: Any, mean: Tensor, table: Tensor) -> Tensor:
    """Means of keys, [B, P, D], normalized and rotated by their first tokens' positions."""
    cos, sin = (torch.cat((half, half), dim=-1) for half in table.chunk(2, dim=-1))
    keys = indexer.k_layernorm(mean)[:, None]
    turned: Tensor = getattr(indexer, ROPE)(keys, cos=cos, sin=sin)
    return turned[:, 0]


def _scoring_indexer(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    cache: Any,
    position_ids: Tensor,
) -> PickedBlocks:
    """MiniMaxM3VLIndexer, whose blocks start where documents do, and not where rows do."""
    with torch.no_grad():
        q, key = (
            norm(projection(hidden_states).unflatten(-1, (-1, self.head_dim)))
            for norm, projection in ((self.q_norm, self.q_proj), (self.k_norm, self.k_proj))
        )
        cos, sin = (table[..., : self.head_dim] for table in position_embeddings)
        q, key = getattr(self, ROPE)(q, key, cos, sin, unsqueeze_dim=2)
        # Norms and rotary tables give fp32 under autocast; scores are then products of its dtype.
        q, key = as_autocast_casts(q, key)
    numbers = self.topk_blocks, self.block_size, self.local_blocks
    return PickedBlocks(ScoredBlockAttention, numbers, ScoreIndex(q, key[:, :, 0]))


BLOCKS: Mapping[str, Callable[..., Any]] = {
    "Qwen4ExpTextAttention": _attend_to_blocks,
    "Qwen4ExpTextQSAIndexer": _indexer,
    "MiniMaxM3VLIndexer": _scoring_indexer,
}
"""By the name of the class."""
