"""Inputs that have caught bugs: packed rows whose borders fall in awkward places, random q, k, v.

A packing is a function of (seq_len, num_shards): borders are placed against the borders of
contiguous shards. All have documents at n = 1 too.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dtcp.sequence.documents import Documents

Packing = Callable[[int, int], Documents]


def one_document(seq_len: int, num_shards: int) -> Documents:
    """A row that is one document."""
    return Documents(((seq_len,),), seq_len)


def across_borders(seq_len: int, num_shards: int) -> Documents:
    """Documents as long as a shard, half a shard late: every border cuts one in two."""
    shard_len = seq_len // num_shards
    half = shard_len // 2
    lengths = (half,) + (shard_len,) * (num_shards - 1) + (shard_len - half,)
    return Documents((lengths,), seq_len)


def one_token_documents(seq_len: int, num_shards: int) -> Documents:
    """Documents of one token at both ends of the row and on either side of the first border."""
    shard_len = seq_len // num_shards
    if num_shards == 1:
        return Documents(((1, 1, seq_len - 3, 1),), seq_len)
    lengths = (1, shard_len - 2, 1, 1, seq_len - shard_len - 2, 1)
    return Documents((lengths,), seq_len)


def on_borders(seq_len: int, num_shards: int) -> Documents:
    """Every shard is one document."""
    return Documents(((seq_len // num_shards,) * num_shards,), seq_len)


def before_borders(seq_len: int, num_shards: int) -> Documents:
    """Documents that end one token before a shard does."""
    shard_len = seq_len // num_shards
    lengths = (shard_len - 1,) + (shard_len,) * (num_shards - 1) + (1,)
    return Documents((lengths,), seq_len)


def after_borders(seq_len: int, num_shards: int) -> Documents:
    """Documents that end one token after a shard does."""
    shard_len = seq_len // num_shards
    if num_shards == 1:
        return Documents(((1, seq_len - 1),), seq_len)
    lengths = (shard_len + 1,) + (shard_len,) * (num_shards - 2) + (shard_len - 1,)
    return Documents((lengths,), seq_len)


def last_shard_padding(seq_len: int, num_shards: int) -> Documents:
    """The last shard holds no document at all; the one before it ends in padding too."""
    end = seq_len - seq_len // num_shards if num_shards > 1 else seq_len - 2
    return Documents(((end // 3, end - end // 3 - 1),), seq_len)


def two_rows(seq_len: int, num_shards: int) -> Documents:
    """Two rows packed differently, the second padded. Layouts by document refuse them."""
    second = (seq_len // 3, seq_len // 2 - 1)
    return Documents(((seq_len // 2 + 1, seq_len - seq_len // 2 - 1), second), seq_len)


def equal_rows(seq_len: int, num_shards: int) -> Documents:
    """Two rows packed alike, both padded."""
    lengths = (seq_len // 3 + 1, seq_len // 2)
    return Documents((lengths, lengths), seq_len)


def empty_row(seq_len: int, num_shards: int) -> Documents:
    """A row of documents, and a row of padding."""
    return Documents(((seq_len // 3, seq_len - seq_len // 3), ()), seq_len)


PACKINGS: tuple[Packing, ...] = (
    one_document,
    across_borders,
    one_token_documents,
    on_borders,
    before_borders,
    after_borders,
    last_shard_padding,
    two_rows,
    equal_rows,
    empty_row,
)


def prefix_lengths(documents: Documents) -> tuple[tuple[int, ...], ...]:
    """A prefix for every document: about a third of it, none for the shortest."""
    return tuple(tuple(length // 3 for length in row) for row in documents.lengths)


def prefix_of_tokens(documents: Documents) -> Tensor:
    """The same, for every token: [B, S], int64, 0 for padding."""
    prefix = torch.zeros(documents.batch, documents.seq_len, dtype=torch.int64)
    for row, lengths in enumerate(documents.lengths):
        start = 0
        for length in lengths:
            prefix[row, start : start + length] = length // 3
            start += length
    return prefix


def blocks_of_tokens(documents: Documents, size: int = 5) -> Tensor:
    """Blocks of `size` tokens, every other one a block (id 0, 1, ..), text between: [B, S].

    Blocks do not heed documents: a border may cut one.
    """
    chunk = torch.arange(documents.seq_len) // size
    ids = torch.where(chunk % 2 == 0, chunk // 2, -1)
    return ids.expand(documents.batch, -1).clone()


def block_ids(documents: Documents, size: int = 5) -> tuple[tuple[int, ...], ...]:
    """The same as tuples, for the reference."""
    return tuple(tuple(row) for row in blocks_of_tokens(documents, size).tolist())


def qkv(
    documents: Documents,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q [B, S, H, D], k and v [B, S, G, D]: leaves that require gradients; by seed alone."""
    generator = torch.Generator().manual_seed(seed)
    B, S = documents.batch, documents.seq_len
    shapes = [(B, S, count, head_dim) for count in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return tuple(x.to(dtype).requires_grad_() for x in (q, k, v))  # type: ignore[return-value]
