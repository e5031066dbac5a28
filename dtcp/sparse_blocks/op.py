"""The choice of blocks by the scores of their tokens as an op: what the tracer does not enter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dtcp.distributed.ledger import LEDGER
from dtcp.kernels.sparse.block_indexer import BlockSight, top_blocks
from dtcp.local_op import local_op
from dtcp.sparse.op import check_sight_of_batch


@local_op("dtcp::select_blocks")
def select_blocks(
    q: Tensor,
    keys: Tensor,
    sight: Sequence[Tensor],
    block_len: int,
    num_blocks: int,
    num_local: int,
) -> Tensor:
    """`top_blocks` as an op, [B, L, H, num_blocks] int32. Has no gradient."""
    given = BlockSight(*sight)
    check_sight_of_batch("An indexer of blocks", given.last, q)
    LEDGER.record("dtcp::select_blocks")
    return top_blocks(q, keys, given, block_len, num_blocks, num_local)


@select_blocks.register_fake
def _(q: Tensor, keys: Tensor, sight: Any, block_len: int, num_blocks: int, _: int) -> Tensor:
    return q.new_empty((*q.shape[:3], num_blocks), dtype=torch.int32)
