"""Attention over latents to the tokens that an indexer picks: DeepSeek-V3.2's and its like.

Two mixers, since layers may share what one of them has picked: the indexer scores tokens and picks
the best for each query; attention reads the latents of these, in absorbed form:

    query of head h = [q @ up[h, :N] | rotary q]      its key = [latent | rotary key], of all heads
    out of head h   = up[h, N:] @ (sum of weights * latents)

A query may read its own document up to itself. From DeepSeek-AI 2025, DeepSeek-V3.2-Exp, section 1,
https://github.com/deepseek-ai/DeepSeek-V3.2-Exp
"""

from typing import Any

import torch
from torch import Tensor

from dtcp.autocast import without_autocast
from dtcp.metadata import BatchMetadata
from dtcp.mixer import Mixer
from dtcp.sequence.arguments import FLOATS, check_ints, check_scale, check_tensor
from dtcp.sequence.coords import Coords
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.masks import Causal
from dtcp.softmax.inputs import check_sink
from dtcp.softmax.latent import LatentMixer, LatentWidths
from dtcp.sparse.op import select_entries, sparse_attention
from dtcp.sparse_latent.metadata import TokensInSight


class TokenReader(Mixer):
    """A mixer whose queries may read any token of their document up to themselves."""

    def set_metadata_key(self) -> None:
        # An indexer and the attention that reads what it picked know the tokens by one numbering.
        self.metadata_key = self.key_of(TokenReader)

    def check_setting(self, name: str, value: Any) -> None:
        if name == "scale" and value is not None:
            check_scale(value)

    def whole_row_metadata(self, coords: Coords) -> TokensInSight:
        return TokensInSight.of_whole_rows(KeyIntervals.of(Causal(), coords))

    def bring(self, rows: Tensor, metadata: TokensInSight, dtype: torch.dtype) -> Tensor:
        """Rows [B, L, G, W] of all tokens in sight, [B, K, G, W], in their order; here: all are.

        Args:
            dtype: in which they travel.
        """
        return rows


class LightningIndexer(TokenReader):
    """Pick the tokens that each query reads: those of the highest sum_h weight_h relu(q_h . key).

    Of equal scores the earlier token wins, so the choice depends on neither tiles nor ranks. It has
    no gradient.

    Args:
        num_selected: tokens that a query reads, at most.
    """

    def __init__(self, num_selected: int) -> None:
        super().__init__()
        check_ints("An indexer", least=1, num_selected=num_selected)
        self.num_selected = num_selected
        self.set_metadata_key()

    def forward(
        self, q: Tensor, weight: Tensor, key: Tensor, attn_metadata: BatchMetadata
    ) -> Tensor:
        """Select.

        Args:
            q: [B, L, H, D], sizes of the indexer's own.
            weight: [B, L, H].
            key: [B, L, D], one for all heads.
            attn_metadata: what the batch brings.
        Returns:
            [B, L, k] int32, places among the tokens in sight of this rank's queries, ascending,
            then -1: what SparseLatentAttention reads of the same batch.
        """
        check_index_operands(q, weight, key)
        return self.select(q, weight, key, self.own(attn_metadata))

    def select(self, q: Tensor, weight: Tensor, key: Tensor, metadata: TokensInSight) -> Tensor:
        """`forward`, once the batch's metadata are known."""
        q, weight, key = (x.detach() for x in (q, weight, key))
        keys = self.bring(key[:, :, None], metadata, key.dtype)[:, :, 0]
        number = min(self.num_selected, keys.shape[1])
        visible = (metadata.first, metadata.last, metadata.token_index, metadata.tiles)
        return select_entries(q, weight, keys, *visible, number)

    def forward_without_mixing(self, *args: Any, **kwargs: Any) -> Tensor:
        q: Tensor = args[0]
        return q.new_zeros(*q.shape[:2], 1, dtype=torch.int32)

    def extra_repr(self) -> str:
        return f"num_selected={self.num_selected}"


def check_index_operands(q: Tensor, weight: Tensor, key: Tensor) -> None:
    """Refuse what scoring would broadcast."""
    check_tensor("An indexer", shape="[B, L, H, D]", ndim=4, dtypes=FLOATS, q=q)
    check_tensor("An indexer", ndim=3, dtypes=FLOATS, weight=weight, key=key)
    if weight.shape != q.shape[:3] or key.shape != (*q.shape[:2], q.shape[3]):
        raise ValueError(
            f"An indexer has a weight for each head and a key for each token, got q.shape="
            f"{tuple(q.shape)}, weight.shape={tuple(weight.shape)}, key.shape="
            f"{tuple(key.shape)}: give [B, L, H, D], [B, L, H] and [B, L, D]."
        )


class SparseLatentAttention(TokenReader, LatentMixer):
    """Attend to the latents of the tokens that a LightningIndexer has picked.

    Args:
        scale: factor on the scores; None for (N + R) ** -0.5.
    """

    def __init__(self, *, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.set_metadata_key()

    def forward(
        self,
        q: Tensor,
        latent: Tensor,
        key_rotary: Tensor,
        up: Tensor,
        selected: Tensor,
        attn_metadata: BatchMetadata,
        *,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Attend to k = [up[:, :N] @ latent | key_rotary] and v = up[:, N:] @ latent.

        Args:
            q: [B, L, H, N + R], the R rotated channels last.
            latent: [B, L, C], normalized.
            key_rotary: [B, L, R], rotated; R = 0 for none.
            up: [H, N + V, C], the weight of the up-projection (kv_b_proj) by heads.
            selected: [B, L, k] int32, of a LightningIndexer or a PooledIndexer in the same batch.
            attn_metadata: what the batch brings.
            sink: [H], one score per head that takes its share of the softmax and adds nothing.
        Returns:
            [B, L, H, V].
        """
        rows = self.rows(q, latent, key_rotary, up)
        self.check_selected(q, selected)
        check_sink(sink, q.shape[2])
        return self.attend(q, rows, up, selected, self.own(attn_metadata), sink)

    def attend(
        self,
        q: Tensor,
        rows: Tensor,
        up: Tensor,
        selected: Tensor,
        metadata: TokensInSight,
        sink: Tensor | None,
    ) -> Tensor:
        """`forward`, once the batch's metadata are known; rows are [B, L, 1, C + R]."""
        widths = LatentWidths.of(q, rows, up)
        content, rotary = q.split((widths.content, widths.rotary), dim=-1)
        of_keys, of_values = up.split((widths.content, widths.value), dim=1)
        with without_autocast(q.device):
            absorbed = torch.einsum("blhn,hnc->blhc", content, of_keys)
        absorbed = torch.cat((absorbed, rotary), dim=-1)
        entries = self.bring(rows, metadata, q.dtype)[:, :, 0]
        no_keys = entries.new_empty(entries.shape[0], 0, entries.shape[2])
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        sources = (no_keys, entries, selected, sink, metadata.sight)
        out = sparse_attention(absorbed, *sources, scale=scale, value_dim=widths.latent)
        with without_autocast(q.device):
            return torch.einsum("blhc,hvc->blhv", out, of_values)

    def check_selected(self, q: Tensor, selected: Tensor) -> None:
        """Refuse a choice for other tokens."""
        check_tensor("Sparse latent attention", shape="[B, L, k]", ndim=3, selected=selected)
        if selected.dtype != torch.int32 or selected.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"Sparse latent attention reads what a LightningIndexer picked for its queries, "
                f"got selected of {selected.dtype}, shape {tuple(selected.shape)}, with q.shape="
                f"{tuple(q.shape)}: pass the indexer's output of the same batch."
            )

    def extra_repr(self) -> str:
        return f"scale={self.scale}"
