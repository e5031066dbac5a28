"""What is added to a score by how far its key lies from its query: per head, a table or a slope.

    score + table[h, R + d] + slope[h] * d        d = key's token index - query's, R = reach

A distance beyond the reach of the table reads its last entry. So T5's buckets are a table of
2 R + 1 numbers per head, ALiBi is one number per head, and nothing here is as large as queries
times keys: a tile of queries and a block of keys get theirs when they are computed.
"""

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation


class ScoreBias:
    """The bias of some heads' scores, and the sums of its gradients.

    Args:
        table: [H, 2 R + 1], or None.
        slope: [H], or None.
        query_index: [L], token index of each query.
        dtype: of scores.
    """

    def __init__(
        self, table: Tensor | None, slope: Tensor | None, query_index: Tensor, dtype: torch.dtype
    ) -> None:
        wide = accumulation(dtype)
        self.table = None if table is None else table.to(wide)
        self.slope = None if slope is None else slope.to(wide)
        self.query_index = query_index
        self.table_gradient = None if self.table is None else torch.zeros_like(self.table)
        self.slope_gradient = None if self.slope is None else torch.zeros_like(self.slope)

    def of_block(self, queries: slice, key_index: Tensor) -> Tensor:
        """The bias of some queries' scores for keys of these token indices, [K]: [H, Q, K]."""
        distance = self._distance(queries, key_index)
        parts = []
        if self.table is not None:
            parts.append(self.table[:, self._place(distance)])
        if self.slope is not None:
            parts.append(self.slope[:, None, None] * distance)
        return sum(parts[1:], parts[0])

    def add_gradients(self, d_scores: Tensor, queries: slice, key_index: Tensor) -> None:
        """Sum up what the gradients [B, H, Q, K] of a block's scores come to."""
        distance, by_head = self._distance(queries, key_index), d_scores.sum(0)
        if self.table_gradient is not None:
            place = self._place(distance).flatten()
            self.table_gradient.index_add_(1, place, by_head.flatten(1))
        if self.slope_gradient is not None:
            self.slope_gradient += (by_head * distance).sum((1, 2))

    def _distance(self, queries: slice, key_index: Tensor) -> Tensor:
        """[Q, K], positive for keys on the right."""
        return key_index.long() - self.query_index[queries, None].long()

    def _place(self, distance: Tensor) -> Tensor:
        assert self.table is not None
        reach = self.table.shape[1] // 2
        return distance.clamp(-reach, reach) + reach
