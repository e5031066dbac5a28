"""A layout of packed documents in which every rank has L tokens and the mean of the work.

document_pieces.py says which pieces these are, and why they always exist.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import numpy as np
from torch import Tensor

from dtcp.sequence.arguments import check_ints
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_pieces import best_pieces
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout, check_divides, shared_lengths
from dtcp.sequence.mask_work import MaskWork, WorkRuns
from dtcp.sequence.masks import Causal
from dtcp.sequence.partition import Ints, Partition, Run, joined_runs, stops_of


@dataclass(frozen=True)
class DocumentBalanced(SequenceLayout):
    """Give every rank the same number of tokens, and the same work but for one token's.

    Where a document goes is decided by its length alone: each rank has one stretch of the tokens
    that cost more than the mean and one of those that cost less. A single document under a causal
    mask is cut head-tail.

        lengths=(3, 9), n=2        rank 0: 0 1 2 9 10 11        rank 1: 3 4 5 6 7 8

    Attributes:
        starts: the token index at which each piece starts, ascending from 0.
        owners: the rank of each piece.
    """

    reads_documents = True
    balances_work = True

    starts: tuple[int, ...] = field(repr=False)
    owners: tuple[int, ...] = field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        starts, owners = self._pieces
        lengths = stops_of(starts, self.seq_len) - starts
        known = len(lengths) == len(owners) and self.starts[:1] == (0,) and (lengths > 0).all()
        known = known and ((owners >= 0) & (owners < self.num_shards)).all()
        held = np.bincount(owners, lengths, self.num_shards).tolist() if known else []
        if held != [self.shard_len] * self.num_shards:
            raise ValueError(
                f"DocumentBalanced gives every rank {self.shard_len} tokens, in pieces that "
                f"follow each other from token 0, got {len(self.starts)} starts and "
                f"{len(self.owners)} owners, tokens={held[:8]}: let for_batch choose the pieces."
            )

    def runs(self, rank: int) -> list[Run]:
        # Not from the partition: dynamo traces this, and arrays would be tensors to it.
        self._check_rank(rank)
        bounds = (*self.starts, self.seq_len)
        mine = [piece for piece, owner in enumerate(self.owners) if owner == rank]
        return joined_runs([(bounds[piece], bounds[piece + 1]) for piece in mine])

    @cached_property
    def _pieces(self) -> tuple[Ints, Ints]:
        """Where they start, and their owners."""
        return np.array(self.starts), np.array(self.owners)

    @cached_property
    def partition(self) -> Partition:
        return Partition.ascending(*self._pieces, self.seq_len)

    @classmethod
    def for_batch(
        cls, documents: Documents, num_shards: int, *, work: Callable[[], Tensor] | None = None
    ) -> Self:
        """Balance `work`, or that of a causal mask inside each document."""
        lengths = shared_lengths(cls, documents)
        check_ints(cls.__name__, least=1, num_shards=num_shards)
        check_divides(cls, documents.seq_len, num_shards, num_shards)
        if work is None:
            work = MaskWork(((Causal(), 1),), Coords.of(documents))
        if isinstance(work, MaskWork) and work.in_runs:
            runs = work.runs(0)
        else:
            runs = WorkRuns.of_tokens(work())
        starts, owners = best_pieces(runs, lengths, num_shards)
        return cls(documents.seq_len, num_shards, tuple(starts.tolist()), tuple(owners.tolist()))
