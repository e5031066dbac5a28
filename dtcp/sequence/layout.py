"""Which rank holds which tokens: a permutation of the sequence, cut into equal shards.

`token_index = layout.permutation()[slot]`, and rank r owns slots [r * L, (r + 1) * L). A placement
says that a dim is sharded; a layout says which tokens a shard holds. Every layout is defined by the
runs of neighbouring tokens that each rank holds: ints, so that they can be read while a graph is
traced, and all that an exchange between ranks needs to know.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import gcd
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.arguments import are_whole, check_dim, check_ints, check_rank
from dtcp.sequence.documents import Documents, check_documents
from dtcp.sequence.partition import Partition, Run, joined_runs, sums_before


@dataclass(frozen=True)
class SequenceLayout(ABC):
    """A sequence of S tokens in n shards of L = S / n slots each.

    `for_batch` makes the layout of a batch all of whose rows share it (`RowLayouts`: each its own).
    """

    reads_documents: ClassVar[bool] = False
    """Whether rows of different documents have different layouts of this kind."""
    balances_work: ClassVar[bool] = False
    """Whether `for_batch` reads the work of tokens."""

    seq_len: int
    num_shards: int

    def __post_init__(self) -> None:
        kind = type(self).__name__
        check_ints(kind, seq_len=self.seq_len, num_shards=self.num_shards)
        if self.num_shards < 1:
            raise ValueError(
                f"{kind} cuts the sequence into at least one shard, got "
                f"num_shards={self.num_shards}: give the size of the cp axis."
            )
        self._check_divides(self.num_shards)

    @abstractmethod
    def runs(self, rank: int) -> list[Run]:
        """The rank's token indices in slot order, as the longest runs of neighbours."""

    @classmethod
    def multiple(cls, num_shards: int) -> int:
        """What seq_len must be divisible by."""
        return num_shards

    @classmethod
    def for_batch(
        cls, documents: Documents, num_shards: int, *, work: Callable[[], Tensor] | None = None
    ) -> Self:
        """The layout of this class that suits the batch.

        Args:
            work: counts the keys that each token sees, [S]; for those with `balances_work`.
        """
        check_documents(f"{cls.__name__} suits the Documents of a batch", documents)
        return cls(documents.seq_len, num_shards)

    @property
    def kind(self) -> type["SequenceLayout"]:
        """What a style accepts or refuses."""
        return type(self)

    @property
    def shard_len(self) -> int:
        """Tokens on each rank: L."""
        return self.seq_len // self.num_shards

    @cached_property
    def partition(self) -> Partition:
        """All runs, by token index: what an exchange between ranks is worked out from."""
        runs = [self.runs(rank) for rank in range(self.num_shards)]
        ends = chain.from_iterable(chain.from_iterable(runs))
        start, stop = np.fromiter(ends, dtype=np.int64).reshape(-1, 2).T
        count = np.array([len(each) for each in runs])
        before, first = sums_before(stop - start)[:-1], sums_before(count)[:-1]
        owner = np.arange(self.num_shards).repeat(count)
        slot = before - before[first[owner]]
        order = np.lexsort((stop, start))
        return Partition(*(x[order] for x in (start, stop, owner, slot)))

    @property
    def segment_len(self) -> int:
        """The greatest length into which the runs of all ranks can be cut evenly.

        Every rank then has L / segment_len segments, so code that works segment by segment
        traces the same graph on all of them.
        """
        ranks = range(self.num_shards)
        return gcd(*[stop - start for rank in ranks for start, stop in self.runs(rank)])

    def segments(self, rank: int) -> list[Run]:
        """The rank's runs cut to segment_len, in slot order: as many on every rank."""
        step = self.segment_len
        return [(a, a + step) for start, stop in self.runs(rank) for a in range(start, stop, step)]

    def token_indices(self, rank: int) -> Tensor:
        """Token index of each of the rank's slots: [L], int64."""
        return torch.cat([torch.arange(*run, device="cpu") for run in self.runs(rank)])

    def permutation(self) -> Tensor:
        """Token index of every slot, rank 0's slots first: [S], int64."""
        return torch.cat([self.token_indices(rank) for rank in range(self.num_shards)])

    def inverse(self) -> Tensor:
        """Slot of every token: [S], int64."""
        permutation = self.permutation()
        return torch.empty_like(permutation).scatter(
            0, permutation, torch.arange(self.seq_len, device="cpu")
        )

    def shard(self, x: Tensor, rank: int, *, dim: int = 1) -> Tensor:
        """Pick the rank's tokens out of all: S in dim becomes L. No communication."""
        self._check_len(x, dim)
        return torch.cat([x.narrow(dim, a, b - a) for a, b in self.runs(rank)], dim=dim)

    def restore(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """Put all shards, concatenated along dim, back into the order of the row: S to S."""
        self._check_len(x, dim)
        return x.index_select(dim, self.inverse().to(x.device))

    def _check_divides(self, multiple: int) -> None:
        check_divides(type(self), self.seq_len, self.num_shards, multiple)

    def _check_rank(self, rank: int) -> None:
        check_rank(type(self).__name__, rank, self.num_shards)

    def _check_len(self, x: Tensor, dim: int) -> None:
        check_dim(type(self).__name__, x, dim)
        if x.shape[dim] != self.seq_len:
            raise ValueError(
                f"{type(self).__name__} reads tensors of seq_len tokens, got "
                f"x.shape={tuple(x.shape)}, dim={dim}, seq_len={self.seq_len}: "
                f"pad x or name the sequence's dim."
            )


@dataclass(frozen=True)
class Contiguous(SequenceLayout):
    """Rank r holds the r-th of n equal stretches.

    What moves along the sequence, a halo or a recurrent state, comes from a neighbouring rank.
    Under a causal mask the last rank has the most work.

        seq_len=8, n=2        rank 0: 0 1 2 3        rank 1: 4 5 6 7
    """

    def runs(self, rank: int) -> list[Run]:
        self._check_rank(rank)
        return [(rank * self.shard_len, (rank + 1) * self.shard_len)]

    @property
    def segment_len(self) -> int:
        return self.shard_len


@dataclass(frozen=True)
class HeadTail(SequenceLayout):
    """Cut the sequence into 2n chunks; of n ranks, rank r holds chunks r and 2n-1-r.

    Under a causal mask an early chunk is cheap and a late one dear: pairing the r-th chunk from
    either end gives every rank the same work. Other libraries call it zigzag or round-robin.

        seq_len=8, n=2        rank 0: 0 1 6 7        rank 1: 2 3 4 5
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_divides(2 * self.num_shards)

    def runs(self, rank: int) -> list[Run]:
        self._check_rank(rank)
        half = self.shard_len // 2
        head, tail = rank * half, (2 * self.num_shards - 1 - rank) * half
        return joined_runs([(head, head + half), (tail, tail + half)])

    @cached_property
    def partition(self) -> Partition:
        ranks = np.arange(self.num_shards)
        # The last rank's two chunks are neighbours.
        start = np.delete(np.arange(2 * self.num_shards) * (self.shard_len // 2), self.num_shards)
        owner = np.append(ranks, ranks[-2::-1])
        return Partition.ascending(start, owner, self.seq_len)

    @property
    def segment_len(self) -> int:
        """One chunk: every rank has two segments, the last one too, whose chunks are neighbours."""
        return self.shard_len // 2

    @classmethod
    def multiple(cls, num_shards: int) -> int:
        return 2 * num_shards


def check_divides(
    layout: type[SequenceLayout], seq_len: int, num_shards: int, multiple: int
) -> None:
    """Refuse a length that cannot be cut into equal parts."""
    if seq_len < multiple or seq_len % multiple:
        raise ValueError(
            f"{layout.__name__} cuts the sequence into equal parts, got seq_len={seq_len}, "
            f"num_shards={num_shards}: pad seq_len to a multiple of {multiple}."
        )


def shared_lengths(layout: type[SequenceLayout], documents: Documents) -> tuple[int, ...]:
    """The documents that all rows have in common: one permutation serves the whole batch."""
    check_documents(f"{layout.__name__} suits the Documents of a batch", documents)
    if len(set(documents.lengths)) != 1:
        raise ValueError(
            f"{layout.__name__} cuts all rows of a batch alike, got rows of differing documents, "
            f"lengths={documents.lengths}: use HeadTail, or one row per batch."
        )
    return documents.lengths[0]


def check_tuple_of_ints(kind: str, **values: tuple[int, ...]) -> None:
    """Refuse anything but a tuple of whole numbers: a layout is a value and has a hash.

    Raises:
        TypeError: as above.
    """
    for name, value in values.items():
        if not isinstance(value, tuple) or not are_whole(value):
            raise TypeError(
                f"{kind} takes a tuple of whole numbers, got {name}={value!r}: give a tuple of "
                f"ints, so that the layout has a hash."
            )
