"""Attention to a window of raw keys and to compressed entries of all that came before.

The mixer of DeepSeek-V4. A query sees the keys of its window, and of the entries, each pooled
from a window of `ratio` tokens of its document, those whose last token is not ahead of it; with
an indexer only the best of them. Windows are counted from the start of a document, and what is
left at its end makes no entry. All of it is a predicate on coordinates: an entry stands where
its last token does, so what a query sees is again one interval of positions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.sparse.pooling import Prepool, pool
from dtcp.metadata import BatchMetadata
from dtcp.mixer import Mixer
from dtcp.mixer_positions import check_position_ids
from dtcp.sequence.arguments import check_ints, check_scale
from dtcp.sequence.coords import Coords
from dtcp.sparse.metadata import Compression, SparseMetadata, sparse_metadata
from dtcp.sparse.op import select_entries, sparse_attention
from dtcp.sparse.operands import check_sparse_operands

__all__ = ["CompressedSparseAttention", "Compression", "Index", "Prepool"]


class Index(NamedTuple):
    """What an indexer scores entries by: sum_h weight_h * relu(q_h . key). Has no gradient."""

    q: Tensor  # [B, L, H, D], sizes of the indexer's own
    weight: Tensor  # [B, L, H]
    keys: Prepool


class CompressedSparseAttention(Mixer):
    """Attend to a window of raw keys and to compressed entries, K = V, one head of keys.

    Args:
        window: raw keys a query sees, its own included.
        compression: None for the window alone.
        scale: factor on the scores.
    """

    def __init__(self, window: int, compression: Compression | None, *, scale: float) -> None:
        super().__init__()
        check_ints("A window of raw keys", window=window)
        if window < 1:
            raise ValueError(
                f"A window counts the query itself, got window={window}: 1 sees only itself."
            )
        self.window, self.compression, self.scale = window, compression, scale
        self.set_metadata_key()

    def check_setting(self, name: str, value: Any) -> None:
        if name == "scale":
            check_scale(value)

    def reads(self) -> tuple[object, ...]:
        return (self.window, self.compression)

    def forward(
        self,
        q: Tensor,
        keys: Tensor,
        attn_metadata: BatchMetadata,
        *,
        sink: Tensor,
        tokens: Prepool | None = None,
        index: Index | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: [B, L, H, D], rotated.
            keys: [B, L, D], rotated; values too.
            sink: [H].
            tokens: to pool; metadata if the mixer has a compression.
            index: metadata if the compression selects.
        Returns:
            [B, L, H, D].
        """
        check_sparse_operands(q, keys, sink, tokens, index, self.compression)
        return self.attend(q, keys, self.own(attn_metadata), sink, tokens, index)

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        metadata: SparseMetadata,
        sink: Tensor,
        tokens: Prepool | None,
        index: Index | None,
    ) -> Tensor:
        """`forward`, once the batch's metadata are known."""
        if metadata.last.shape != q.shape[:2]:
            raise ValueError(
                f"Compressed sparse attention reads the metadata of its own batch, got some for "
                f"{tuple(metadata.last.shape)} tokens with q.shape={tuple(q.shape)}: pass those "
                f"made with this batch."
            )
        compression = self.compression
        if compression is None:
            keys, _ = self.bring(keys, None, metadata)
            return sparse_attention(q, keys, None, None, sink, metadata.sight, scale=self.scale)
        assert tokens is not None
        keys, (tokens, *of_index) = self._bring(keys, tokens, index, metadata)
        entries = self.gather(self._entries(tokens, metadata), metadata)
        selected = None
        if compression.selected is not None:
            assert index is not None
            with torch.no_grad():
                index_keys = self.gather(self._entries(of_index[0], metadata), metadata)
                visible = (metadata.first, metadata.last, metadata.closing, metadata.tiles)
                number = min(compression.selected, entries.shape[1])
                queries = (index.q.detach(), index.weight.detach())
                selected = select_entries(*queries, index_keys, *visible, number)
        return sparse_attention(q, keys, entries, selected, sink, metadata.sight, scale=self.scale)

    def check_position_ids(self, position_ids: Tensor, attn_metadata: BatchMetadata) -> None:
        """Stop a model that rotates by other position_ids [B, L] than entries are rotated by."""
        metadata: SparseMetadata = self.own(attn_metadata)
        check_position_ids(position_ids, metadata.position_ids, metadata.last >= 0)

    def forward_without_mixing(self, *args: Any, **kwargs: Any) -> Tensor:
        q, keys = args[:2]
        return keys[:, :, None].expand_as(q)

    def bring(
        self, keys: Tensor, pooled: Tensor | None, metadata: SparseMetadata
    ) -> tuple[Tensor, Tensor | None]:
        """Line up the keys and the tokens to pool with those just left of them; here: none are."""
        return keys, pooled

    def gather(self, entries: Tensor, metadata: SparseMetadata) -> Tensor:
        """The entries of the whole sequence, in the order of their positions; here: all are."""
        return entries

    def whole_row_metadata(self, coords: Coords) -> SparseMetadata:
        whole = [[(0, coords.token_index.shape[1])]]
        return sparse_metadata(coords, whole, 0, self.window, self.compression, halo=False)

    def extra_repr(self) -> str:
        return f"window={self.window}, compression={self.compression}, scale={self.scale}"

    def _bring(
        self, keys: Tensor, tokens: Prepool, index: Index | None, metadata: SparseMetadata
    ) -> tuple[Tensor, list[Prepool]]:
        """Bring keys, and all that is pooled as one tensor: so there is one exchange."""
        pooled = [tokens] if index is None else [tokens, index.keys]
        parts = [x for one in pooled for x in (one.value, one.gate)]
        parts[2:] = [x.detach() for x in parts[2:]]
        keys, lined_up = self.bring(keys, torch.cat(parts, dim=-1), metadata)
        assert lined_up is not None
        split = lined_up.split([x.shape[-1] for x in parts], dim=-1)
        pairs = zip(pooled, split[::2], split[1::2], strict=True)
        return keys, [Prepool(value, gate, one.bias, one.finish) for one, value, gate in pairs]

    def _entries(self, tokens: Prepool, metadata: SparseMetadata) -> Tensor:
        assert self.compression is not None
        pooled = pool(tokens, metadata.windows, overlap=self.compression.overlap)
        return tokens.finish(pooled, metadata.entry_position_ids)
