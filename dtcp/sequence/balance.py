"""Assign blocks of a sequence to ranks: the same number to each, and about the same work.

Ints in, ints out: `Mask.work` counts what tokens cost under a mask, and `BlockBalanced` says which
tokens the answer gives to each rank.
"""

from collections.abc import Sequence
from heapq import heappop, heapreplace

from torch import Tensor

from dtcp.sequence.arguments import check_ints, check_tensor


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
