"""What is added to a score by how far its key lies from its query.

    score + table[h, R + d] + slope[h] * d + relative[q, h] @ profiles[:, -d]

d is the key's token index less the query's, R the reach of the table. A distance beyond the reach
reads the table's last entry; profiles are of the query itself and W - 1 tokens left of it, and
nothing is added beyond. So T5's buckets are a table of 2 R + 1 numbers per head, ALiBi is one
number per head, Inkling's queries mix a few profiles, and nothing here is as large as queries times
keys: a tile of queries and a block of keys get theirs when they are computed.
"""

from copy import copy
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from dtcp.kernels.dtypes import accumulation

PARTS = ("table", "slope", "relative", "profiles")


class ScoreBias:
    """The bias of some heads' scores, and the sums of its gradients.

    Args:
        table: [H, 2 R + 1], or None.
        slope: [H], or None.
        relative: [B, L, H, C], what each query makes of the C profiles, or None.
        profiles: [C, W], with `relative`.
        query_index: [L], token index of each query.
        dtype: of scores.
    """

    def __init__(
        self,
        table: Tensor | None,
        slope: Tensor | None,
        relative: Tensor | None = None,
        profiles: Tensor | None = None,
        *,
        query_index: Tensor,
        dtype: torch.dtype,
    ) -> None:
        wide = accumulation(dtype)
        parts = (table, slope, relative, profiles)
        self.table, self.slope, self.relative, self.profiles = (
            None if x is None else x.to(wide) for x in parts
        )
        self.query_index = query_index

    @cached_property
    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of table, slope, relative and profiles, summed over the blocks that have been added."""
        parts = (self.table, self.slope, self.relative, self.profiles)
        return tuple(None if x is None else torch.zeros_like(x) for x in parts)

    def of_block(self, queries: tuple[slice, slice], key_index: Tensor) -> Tensor:
        """The bias of some queries' scores for keys of these token indices, [K].

        Args:
            queries: rows, and queries in them.
        Returns:
            [B or 1, H, Q, K].
        """
        distance = self._distance(queries[1], key_index)
        parts = []
        if self.table is not None:
            parts.append(self.table[None, :, self._place(distance)])
        if self.slope is not None:
            parts.append((self.slope[:, None, None] * distance)[None])
        if self.relative is not None and self.profiles is not None:
            by_distance = (self.relative[queries] @ self.profiles).transpose(1, 2)
            place = self._backward_place(distance).expand(*by_distance.shape[:2], -1, -1)
            parts.append(F.pad(by_distance, (0, 1)).gather(-1, place))
        return sum(parts[1:], parts[0])

    def add_gradients(
        self, d_scores: Tensor, queries: tuple[slice, slice], key_index: Tensor
    ) -> None:
        """Sum up what the gradients [B, H, Q, K] of a block's scores come to."""
        distance, by_head = self._distance(queries[1], key_index), d_scores.sum(0)
        table, slope, relative, profiles = self.gradients
        if table is not None:
            table.index_add_(1, self._place(distance).flatten(), by_head.flatten(1))
        if slope is not None:
            slope += (by_head * distance).sum((1, 2))
        if relative is not None and profiles is not None:
            assert self.relative is not None and self.profiles is not None
            place = self._backward_place(distance).expand_as(d_scores)
            width = profiles.shape[1]
            # One key for each distance, but for what all keys beyond the profiles share.
            by_distance = d_scores.new_zeros(*d_scores.shape[:3], width + 1)
            by_distance = by_distance.scatter_(-1, place, d_scores)[..., :width]
            relative[queries] += torch.einsum("bhqw,cw->bqhc", by_distance, self.profiles)
            mixed = self.relative[queries]
            profiles += torch.einsum("bqhc,bhqw->cw", mixed, by_distance)

    @property
    def names(self) -> frozenset[str]:
        """Of what it is made of."""
        parts = (self.table, self.slope, self.relative, self.profiles)
        return frozenset(n for n, x in zip(PARTS, parts, strict=True) if x is not None)

    @property
    def has_rows(self) -> bool:
        """Whether there is more than a slope."""
        return self.table is not None or self.relative is not None

    @property
    def distances(self) -> range:
        """Those with a bias of their own; all beyond share that of the first and of the last."""
        reach = 0 if self.table is None else self.table.shape[1] // 2
        width = 0 if self.profiles is None else self.profiles.shape[1]
        # Beyond profiles is one of 0, on each side.
        return range(-max(reach, width), max(reach, min(width, 1)) + 1)

    def emptied(self) -> "ScoreBias":
        """The same, with sums of its own that start from zero."""
        other = copy(self)
        other.__dict__.pop("gradients", None)
        return other

    def of_queries(self, queries: slice) -> "ScoreBias":
        """The bias of some queries, which sums up its gradients where those of all are."""
        part = copy(self)
        part.__dict__.pop("rows", None)
        part.query_index = self.query_index[queries]
        # The sums themselves, also those that nothing has been added to yet.
        table, slope, relative, profiles = self.gradients
        if self.relative is not None and relative is not None:
            part.relative, relative = self.relative[:, queries], relative[:, queries]
        part.gradients = (table, slope, relative, profiles)
        return part

    @cached_property
    def rows(self) -> Tensor | None:
        """What is added at each of `distances`, but for the slope: [B or 1, L or 1, H, N]."""
        parts = []
        if self.table is not None:
            at = torch.arange(self.distances.start, self.distances.stop, device=self.table.device)
            parts.append(self.table[:, self._place(at)][None, None])
        if self.relative is not None:
            parts.append(self.relative @ self._padded_profiles())
        return sum(parts[1:], parts[0]) if parts else None

    def add_row_gradients(self, d_rows: Tensor) -> None:
        """Sum up what the gradients [B, L, H, N] of `rows` come to, without atomics."""
        table, _, relative, profiles = self.gradients
        if table is not None:
            by_distance, extra = d_rows.sum((0, 1)), -self.distances.start - table.shape[1] // 2
            stop = extra + table.shape[1]
            table += by_distance[:, extra:stop]
            table[:, 0] += by_distance[:, :extra].sum(1)
            table[:, -1] += by_distance[:, stop:].sum(1)
        if relative is not None and profiles is not None:
            assert self.relative is not None
            relative += d_rows @ self._padded_profiles().T
            of_padded = self.relative.flatten(0, 2).T @ d_rows.flatten(0, 2)
            last = 1 - self.distances.start
            profiles += of_padded[:, last - profiles.shape[1] : last].flip(1)

    def _padded_profiles(self) -> Tensor:
        """[C, N], by ascending distance, with zeros where they add nothing."""
        assert self.profiles is not None
        distances, width = self.distances, self.profiles.shape[1]
        padding = (1 - width - distances.start, distances.stop - 1)
        return F.pad(self.profiles.flip(1), padding)

    def _distance(self, queries: slice, key_index: Tensor) -> Tensor:
        """[Q, K], positive for keys on the right."""
        return key_index.long() - self.query_index[queries, None].long()

    def _place(self, distance: Tensor) -> Tensor:
        assert self.table is not None
        reach = self.table.shape[1] // 2
        return distance.clamp(-reach, reach) + reach

    def _backward_place(self, distance: Tensor) -> Tensor:
        """How far each key lies back; W, behind all profiles, for one that none is of."""
        assert self.profiles is not None
        width = self.profiles.shape[1]
        return torch.where((distance > 0) | (distance <= -width), width, -distance)
