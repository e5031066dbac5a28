"""What rotary angles are counted by, at some tokens of whole rows: nothing as long as a row."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcp.mixer_positions import rotated_positions
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.partition import stops_of
from dtcp.sequence.row_layouts import RowLayouts


@dataclass(frozen=True, eq=False)
class TokenPositions:
    """The position ids of whole rows, looked up where keys are made of what arrives.

    Args:
        documents: of the rows.
        position_ids: [B, S], whole numbers; None where they count each document's tokens from 0.
            Padding, which nothing sees, then counts on from its start.
    """

    documents: Documents | None
    position_ids: Tensor | None = None

    @classmethod
    def of(cls, coords: Coords) -> Self:
        counted = coords.documents is not None and coords.position_ids is None
        return cls(coords.documents, None if counted else rotated_positions(coords))

    def at(
        self, tokens: NDArray[np.int32], *, in_line: bool, out: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """Those of some tokens, ascending, [K].

        Args:
            in_line: tokens are counted through all rows, one after another.
            out: [B, K], or [1, K] where tokens are counted through all rows.
        """
        if self.position_ids is not None:
            lines = self.position_ids.reshape(1, -1) if in_line else self.position_ids
            out[:] = lines.numpy()[:, tokens]
            return out
        for row, start in zip(out, self._starts(in_line=in_line), strict=True):
            index = tokens.searchsorted(start)
            count = stops_of(index, len(tokens)) - index
            np.subtract(tokens, start.repeat(count), out=row)
        return out

    def own(self, layout: SequenceLayout, rank: int) -> Tensor:
        """Those of a rank's tokens: [B, L], int32."""
        out = np.empty((self.rows, layout.shard_len), dtype=np.int32)
        if isinstance(layout, RowLayouts):
            tokens = layout.in_line.partition.tokens(rank)
            self.at(tokens, in_line=True, out=out.reshape(1, -1))
        else:
            self.at(layout.partition.tokens(rank), in_line=False, out=out)
        return torch.from_numpy(out)

    @property
    def rows(self) -> int:
        """B."""
        if self.position_ids is not None:
            return len(self.position_ids)
        assert self.documents is not None
        return self.documents.batch

    def _starts(self, *, in_line: bool) -> list[NDArray[np.int32]]:
        """Where documents start, and padding, in each row or on the line of all of them."""
        assert self.documents is not None
        if not in_line:
            return self._row_starts
        seq_len = self.documents.seq_len
        rows = enumerate(self._row_starts)
        return [np.concatenate([x + np.int32(row * seq_len) for row, x in rows])]

    @cached_property
    def _row_starts(self) -> list[NDArray[np.int32]]:
        assert self.documents is not None
        return [np.cumsum([0, *lengths], dtype=np.int32) for lengths in self.documents.lengths]
