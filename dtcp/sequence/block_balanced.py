"""Blocks of a row dealt to ranks by their work: for masks that no rule balances."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heapreplace
from math import gcd
from typing import ClassVar, Self

import numpy as np
from torch import Tensor

from dtcp.sequence.arguments import check_ints, check_tensor
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout, check_divides, check_tuple_of_ints, shared_lengths
from dtcp.sequence.mask_work import MaskWork
from dtcp.sequence.masks import Causal
from dtcp.sequence.partition import Partition, Run, joined_runs


@dataclass(frozen=True)
class BlockBalanced(SequenceLayout):
    """Assign blocks of the sequence to ranks by the work that each is under the batch's mask.

    Every rank holds the same number of blocks, in the order of the row. For masks that no rule
    balances: sliding windows beside prefixes, documents of any length.

        seq_len=8, n=2, block=2, owners=(0, 1, 1, 0)        rank 0: 0 1 6 7        rank 1: 2 3 4 5

    Attributes:
        block: tokens.
        owners: the rank of each block.
    """

    reads_documents = True
    balances_work = True

    block: int
    owners: tuple[int, ...]

    blocks_per_shard: ClassVar[int] = 8
    """The least number of blocks per rank, where for_batch chooses the block."""
    largest_block: ClassVar[int] = 128
    """Tokens; the tile that kernels either skip or compute."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ints("BlockBalanced", block=self.block)
        check_tuple_of_ints("BlockBalanced", owners=self.owners)
        if self.block < 1 or self.shard_len % self.block:
            raise ValueError(
                f"BlockBalanced fills each shard with whole blocks, got block={self.block}, "
                f"shard_len={self.shard_len}: choose a block that divides the shard."
            )
        blocks = Counter(self.owners)
        counts = [blocks[rank] for rank in range(self.num_shards)]
        equal = self.shard_len // self.block
        if len(self.owners) != equal * self.num_shards or set(counts) != {equal}:
            raise ValueError(
                f"BlockBalanced gives every rank {equal} blocks, got counts={counts} among "
                f"{len(self.owners)} owners: let for_batch choose them."
            )

    @property
    def segment_len(self) -> int:
        """One block, whatever the batch: the graph must not change with the owners."""
        return self.block

    def runs(self, rank: int) -> list[Run]:
        # Not from the partition: dynamo traces this, and arrays would be tensors to it.
        self._check_rank(rank)
        mine = [block for block, owner in enumerate(self.owners) if owner == rank]
        return joined_runs([(block * self.block, (block + 1) * self.block) for block in mine])

    @cached_property
    def partition(self) -> Partition:
        start = np.arange(len(self.owners), dtype=np.int64) * self.block
        return Partition.ascending(start, np.array(self.owners, dtype=np.int64), self.seq_len)

    @classmethod
    def multiple(cls, num_shards: int) -> int:
        return cls.blocks_per_shard * num_shards

    @classmethod
    def for_batch(
        cls, documents: Documents, num_shards: int, *, work: Callable[[], Tensor] | None = None
    ) -> Self:
        """Balance `work`, or that of a causal mask inside each document."""
        shared_lengths(cls, documents)
        check_ints(cls.__name__, least=1, num_shards=num_shards)
        check_divides(cls, documents.seq_len, num_shards, num_shards)
        seq_len, per_shard = documents.seq_len, documents.seq_len // num_shards
        block = gcd(per_shard, max(1, min(cls.largest_block, per_shard // cls.blocks_per_shard)))
        if work is None:
            work = MaskWork(((Causal(), 1),), Coords.of(Documents(documents.lengths[:1], seq_len)))
        if isinstance(work, MaskWork) and work.in_runs:
            weights = work.of_blocks(block)
        else:
            weights = block_work(work(), block)
        owners = assign_blocks(weights, num_shards)
        return cls(seq_len, num_shards, block, owners)


def block_work(work: Tensor, block: int) -> list[int]:
    """Add the work of the tokens of each block.

    Args:
        work: [S], keys that each token sees.
        block: tokens.
    Returns:
        S / block sums, in the order of the row.
    """
    check_tensor("block_work", shape="[S]", work=work)
    check_ints("block_work", block=block)
    if work.dim() != 1 or block < 1 or work.numel() % block:
        raise ValueError(
            f"block_work cuts one row into equal blocks, got work.shape={tuple(work.shape)}, "
            f"block={block}: choose a block that divides the row's length."
        )
    return work.view(-1, block).sum(dim=1).tolist()


def assign_blocks(work: Sequence[int], num_shards: int) -> tuple[int, ...]:
    """Assign blocks to ranks, the heaviest first, each to the rank with the least work so far.

    A rank that has its equal number of blocks is given no more. Ties go to the earlier block and
    the lower rank, so every rank that computes this gets the same answer.

    Args:
        work: one number per block.
    Returns:
        The rank of each block.

    From Graham 1969, "Bounds on multiprocessing timing anomalies" (longest processing time first),
    https://doi.org/10.1137/0117039
    """
    check_ints("assign_blocks", num_shards=num_shards)
    if not isinstance(work, Sequence) or not all(
        issubclass(kind, int | float) for kind in set(map(type, work))
    ):
        raise TypeError(
            f"assign_blocks weighs one number per block, got work={work!r}: give a list of them."
        )
    if num_shards < 1 or len(work) % num_shards:
        raise ValueError(
            f"assign_blocks gives every rank the same number of blocks, got {len(work)} blocks, "
            f"num_shards={num_shards}: choose a block so that num_shards divides their number."
        )
    room = [len(work) // num_shards] * num_shards
    loads = [(0, rank) for rank in range(num_shards)]
    owners = [0] * len(work)
    for index in sorted(range(len(work)), key=work.__getitem__, reverse=True):
        load, rank = loads[0]
        owners[index] = rank
        room[rank] -= 1
        if room[rank]:
            heapreplace(loads, (load + work[index], rank))
        else:
            heappop(loads)
    return tuple(owners)
