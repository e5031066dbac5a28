"""Attention to the tokens of blocks that an indexer picks, with keys and values by heads: Qwen4's.

A block's index key is made of those of its tokens: their mean, finished by the model (a norm, and
positions of the first token). Of the complete blocks of its document up to itself a query picks
those of the highest sum_h relu(q_h . key), and reads their tokens and the ones behind the last
complete block, itself included.

From Qwen Team 2026, Qwen4-Exp, as of transformers 5.23 (models/qwen4_exp): QSA.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dtcp.kernels.dtypes import accumulation
from dtcp.metadata import BatchMetadata
from dtcp.sequence.arguments import FLOATS, check_ints, check_tensor
from dtcp.sequence.coords import Coords
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.masks import Causal
from dtcp.sparse.op import select_entries, sparse_attention
from dtcp.sparse_latent.blocks import BlocksInSight, rows_of_blocks, tokens_of_blocks
from dtcp.sparse_latent.metadata import TokensInSight
from dtcp.sparse_latent.mixer import TokenReader

SUBJECT = "Attention to picked blocks"


class BlockIndex(NamedTuple):
    """What blocks are picked by. Nothing of it has a gradient.

    Args:
        q: [B, L, H, D], finished queries, sizes of the indexer's own.
        key: [B, L, D], raw keys, one for all heads.
        table: [B, L, T], what `finish` reads of a block's first token: its rotary tables, say.
        finish: means of keys [B, P, D] and tables [B, P, T] of first tokens -> keys [B, P, D].
    """

    q: Tensor
    key: Tensor
    table: Tensor
    finish: Callable[[Tensor, Tensor], Tensor]


class ScoreIndex(NamedTuple):
    """What blocks are picked by where their tokens are scored. Nothing of it has a gradient.

    Args:
        q: [B, L, G, D], finished queries, one for each head of keys and values.
        key: [B, L, D], finished keys, one for all heads.
    """

    q: Tensor
    key: Tensor


class SparseBlockAttention(TokenReader):
    """Attend to the tokens of picked blocks, and to those behind the last complete one.

    Of equal scores the earlier block wins, so the choice depends on neither tiles nor ranks. It has
    no gradient.

    Args:
        num_blocks: blocks that a query picks, at most.
        block_len: tokens in a block.
        scale: factor on the scores of attention; None for D ** -0.5.
    """

    index_takes: ClassVar[str] = (
        "index.q [B, L, I, W], index.key [B, L, W] and index.table [B, L, T]"
    )

    def __init__(self, num_blocks: int, block_len: int, *, scale: float | None = None) -> None:
        super().__init__()
        check_ints(SUBJECT, least=1, num_blocks=num_blocks, block_len=block_len)
        self.num_blocks, self.block_len, self.scale = num_blocks, block_len, scale
        self.set_metadata_key()

    def reads(self) -> tuple[object, ...]:
        return (self.block_len,)

    def set_metadata_key(self) -> None:
        self.metadata_key = self.key_of(SparseBlockAttention, *self.reads())

    def whole_row_metadata(self, coords: Coords) -> BlocksInSight:  # type: ignore[override]
        intervals = KeyIntervals.of(Causal(), coords)
        return self.blocks_of(TokensInSight.of_whole_rows(intervals), intervals)

    def blocks_of(self, tokens: TokensInSight, intervals: KeyIntervals) -> BlocksInSight:
        """The blocks that it picks from, of tokens that are held."""
        return BlocksInSight.of(tokens, intervals, self.block_len, complete=True)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, index: Any, attn_metadata: BatchMetadata
    ) -> Tensor:
        """Attend.

        Args:
            q: [B, L, H, D].
            k: [B, L, G, D], v: [B, L, G, V]; H a multiple of G.
            index: a BlockIndex of the same tokens.
            attn_metadata: what the batch brings.
        Returns:
            [B, L, H, V].
        """
        self.check_operands(q, k, v, index)
        return self.attend(q, k, v, index, self.own(attn_metadata))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, index: Any, metadata: BlocksInSight
    ) -> Tensor:
        """`forward`, once the batch's metadata are known.

        To the kernels of dtcp/sparse a token is an entry, whose value is its first channels: the
        value and the key of one kv head, read by queries that are 0 where the value is.
        """
        selected, value_dim, heads = self.select(index, metadata), v.shape[-1], k.shape[2]
        rows = self.bring(torch.cat((v, k), dim=-1), metadata.tokens, q.dtype)
        no_keys = rows.new_empty(rows.shape[0], 0, rows.shape[-1])
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        queries = F.pad(q, (value_dim, 0)).chunk(heads, dim=2)
        selections = selected.unbind(2) if selected.ndim == 4 else (selected,) * heads
        out = [
            sparse_attention(
                of_head,
                no_keys,
                entries,
                of_group,
                None,
                metadata.tokens.sight,
                scale=scale,
                value_dim=value_dim,
            )
            for of_head, entries, of_group in zip(queries, rows.unbind(2), selections, strict=True)
        ]
        return torch.cat(out, dim=2)

    @torch.no_grad()
    def select(self, index: BlockIndex, metadata: BlocksInSight) -> Tensor:
        """Which tokens each query reads, [B, L, (num_blocks + 1) * block_len - 1] int32.

        They are places among the tokens in sight of this rank's queries, ascending, then -1.
        """
        keys, tokens = self.block_keys(index, metadata), metadata.tokens
        number = min(self.num_blocks, keys.shape[1])
        visible = (tokens.first, tokens.last, metadata.closing, metadata.tiles)
        picked = select_entries(index.q, torch.ones_like(index.q[..., 0]), keys, *visible, number)
        return self.tokens_of(picked, metadata)

    def block_keys(self, index: BlockIndex, metadata: BlocksInSight) -> Tensor:
        """Keys of all blocks in sight, [B, P, D], in their order."""
        rows = torch.cat((index.key, index.table), dim=-1)[:, :, None]
        rows = self.bring(rows, metadata.tokens, rows.dtype)[:, :, 0]
        keys, table = rows.split((index.key.shape[-1], index.table.shape[-1]), dim=-1)
        of_blocks = rows_of_blocks(keys, metadata.start, self.block_len)
        of_blocks = of_blocks.to(accumulation(index.key.dtype))
        first = table.take_along_dim(metadata.start.long()[..., None], dim=1)
        mean = of_blocks.mean(2).to(index.key.dtype)
        return index.finish(mean, first.to(index.table.dtype)).to(index.q.dtype)

    def tokens_of(self, picked: Tensor, metadata: BlocksInSight) -> Tensor:
        """The tokens of picked blocks [B, L, k], ascending then -1, and those behind the last."""
        return tokens_of_blocks(picked, metadata, self.block_len)

    @staticmethod
    def fits(index: Any, kv_heads: int) -> bool:
        """Whether queries of an index have the heads and channels that they are scored by."""
        return index.key.shape[2] == index.q.shape[3]

    def check_operands(self, q: Tensor, k: Tensor, v: Tensor, index: Any) -> None:
        """Refuse what would be broadcast, or read as something else."""
        check_tensor(SUBJECT, shape="[B, L, H, D]", ndim=4, dtypes=FLOATS, q=q, k=k, v=v)
        check_tensor(SUBJECT, shape="[B, L, H, D]", ndim=4, dtypes=FLOATS, index_q=index.q)
        others = index._asdict().items()
        named = {f"index_{name}": x for name, x in others if name not in ("q", "finish")}
        check_tensor(SUBJECT, ndim=3, dtypes=FLOATS, **named)
        if not q.dtype == k.dtype == v.dtype:
            # What travels is of the queries' dtype, and would be rounded on ranks alone.
            raise TypeError(
                f"{SUBJECT} computes in one floating dtype, got q.dtype={q.dtype}, k.dtype="
                f"{k.dtype}, v.dtype={v.dtype}: convert q, k and v to one."
            )
        tokens, heads = q.shape[:2], k.shape[2]
        of_heads = k.shape[3] == q.shape[3] and v.shape[2] == heads and q.shape[2] % heads == 0
        alike = all(x.shape[:2] == tokens for x in (k, v, index.q, *named.values()))
        if not (of_heads and self.fits(index, heads) and alike):
            shapes = {"q": q, "k": k, "v": v, "index.q": index.q, **named}
            raise ValueError(
                f"{SUBJECT} reads keys and values of its queries' tokens, by heads, and an index "
                f"of them, got shapes { {name: tuple(x.shape) for name, x in shapes.items()} }: "
                f"give q [B, L, H, D], k [B, L, G, D], v [B, L, G, V], {self.index_takes}, H a "
                f"multiple of G."
            )

    def extra_repr(self) -> str:
        return f"num_blocks={self.num_blocks}, block_len={self.block_len}, scale={self.scale}"
