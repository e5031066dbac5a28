"""A layout that balances packed documents one by one: each is cut head-tail."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout, check_tuple_of_ints, shared_lengths
from dtcp.sequence.partition import Ints, Partition, Run, joined_runs


@dataclass(frozen=True)
class PerDocument(SequenceLayout):
    """Cut every document head-tail by itself, so that packed documents are balanced too.

    Each document is cut into 2n chunks, and rank r holds chunks r and 2n-1-r of it. Where 2n does
    not divide a document, each token left over lengthens one chunk, and the ranks take turns,
    through all documents: so no document needs padding, and every rank ends with L tokens. What
    follows the documents is cut as if it were one.

        lengths=(4, 5), seq_len=12, n=2     rank 0: 0 3 4 5 8 9     rank 1: 1 2 6 7 10 11

    Attributes:
        lengths: tokens of each document, first to last.
    """

    reads_documents = True

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tuple_of_ints("PerDocument", lengths=self.lengths)
        if min(self.lengths, default=1) < 1 or sum(self.lengths) > self.seq_len:
            raise ValueError(
                f"PerDocument takes documents of one token or more that fit the sequence, got "
                f"lengths={self.lengths}, seq_len={self.seq_len}: take one row of Documents."
            )

    def runs(self, rank: int) -> list[Run]:
        self._check_rank(rank)
        if not torch.compiler.is_compiling():
            return self.partition.runs(rank)
        # Arrays would be tensors to dynamo.
        return _head_tail_runs(self._lengths, self.num_shards, rank)

    @property
    def _lengths(self) -> tuple[int, ...]:
        """Of documents, and of what follows them."""
        return (*self.lengths, self.seq_len - sum(self.lengths))

    @cached_property
    def partition(self) -> Partition:
        lengths = np.array(self._lengths, dtype=np.int64)
        chunks = _head_tail_chunks(lengths, self.num_shards).flatten()
        ranks = np.arange(self.num_shards)
        owner = np.tile(np.append(ranks, ranks[::-1]), len(lengths))
        some = chunks > 0
        start = np.append(0, np.cumsum(chunks)[:-1])
        return Partition.ascending(start[some], owner[some], self.seq_len)

    @classmethod
    def for_batch(
        cls, documents: Documents, num_shards: int, *, work: Callable[[], Tensor] | None = None
    ) -> Self:
        lengths = shared_lengths(cls, documents)
        return cls(documents.seq_len, num_shards, lengths)


def _head_tail_chunks(lengths: Ints, num_shards: int) -> Ints:
    """Cut each of N documents into 2n chunks: their lengths, [N, 2n].

    The tokens left over go to the ranks in turn, through all documents: the first such token of a
    rank lengthens its head chunk, the second its tail chunk. All of them together are a multiple
    of n, since S is, so the turns end evenly.
    """
    chunk, leftover = np.divmod(lengths[:, None], 2 * num_shards)
    turn = np.cumsum(leftover)[:, None] - leftover
    index = (np.arange(num_shards) - turn) % num_shards
    head, tail = chunk + (index < leftover), chunk + (index + num_shards < leftover)
    return np.concatenate((head, tail[:, ::-1]), axis=1)


def _head_tail_runs(lengths: tuple[int, ...], num_shards: int, rank: int) -> list[Run]:
    """What one rank holds of documents that `_head_tail_chunks` cuts, in ints of Python."""
    runs: list[Run] = []
    start = turn = 0
    for length in lengths:
        chunk, leftover = divmod(length, 2 * num_shards)
        index = (rank - turn) % num_shards
        before = _turns_before(rank, turn, min(leftover, num_shards), num_shards)
        head = start + rank * chunk + before
        start += length
        before = _turns_before(rank, turn, leftover - num_shards, num_shards)
        tail = start - rank * chunk - before
        runs.append((head, head + chunk + (index < leftover)))
        runs.append((tail - chunk - (index + num_shards < leftover), tail))
        turn = (turn + leftover) % num_shards
    return joined_runs(runs)


def _turns_before(rank: int, turn: int, count: int, num_shards: int) -> int:
    """How many of the ranks before one have a turn, of so many turns from rank `turn` on."""
    end = turn + count
    return max(0, min(rank, end) - turn) + max(0, min(rank, end - num_shards))
