"""Which document every token of a packed row belongs to, known on the host from lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

PADDING = -1


def restarts(position: Tensor, padding: Tensor | None = None) -> bool:
    """Whether positions count anew somewhere among tokens: packed rows.

    Args:
        position: [B, S] or [1, S]; of [axes, B, S] the first is read, which an image may hold.
        padding: [B, S], True where positions say nothing.
    """
    first, stays = (position[0], 1) if position.ndim == 3 else (position, 0)
    again = first.diff(dim=-1) < 1 - stays
    if padding is not None:
        real = ~padding.bool().to(position.device)
        again = again & real[:, 1:] & real[:, :-1]
    return bool(again.any())


@dataclass(frozen=True)
class Documents:
    """The documents of every row of a batch: lengths in tokens, first to last.

    Documents follow each other without gaps; what they leave of a row is padding, which belongs
    to no document and is seen by no token.

        lengths=((3, 4),), seq_len=8        document:             0 0 0 1 1 1 1 -1
                                            position_ids: 0 1 2 0 1 2 3  0
    """

    lengths: tuple[tuple[int, ...], ...]
    seq_len: int

    def __post_init__(self) -> None:
        for row, lengths in enumerate(self.lengths):
            for index, length in enumerate(lengths):
                if length < 1:
                    raise ValueError(
                        f"A document has at least one token, got length={length} for document "
                        f"{index} of row {row}: leave empty documents out of `lengths`."
                    )
            if sum(lengths) > self.seq_len:
                raise ValueError(
                    f"The documents of a row fit into it, got {sum(lengths)} tokens in row {row} "
                    f"with seq_len={self.seq_len}: cut the last document or pack fewer."
                )

    @classmethod
    def single(cls, batch: int, seq_len: int) -> "Documents":
        """One document a row, filling it."""
        return cls(((seq_len,),) * batch, seq_len)

    @classmethod
    def from_positions(cls, position: Tensor) -> "Documents":
        """Read documents off positions that restart at 0 where a document starts.

        Args:
            position: [B, S], on the host: reading a device tensor would stall the step.
        Raises:
            ValueError: a row that does not start at 0, or a position that neither restarts nor
                continues (left padding, positions of an image grid).
        """
        if position.ndim != 2:
            raise ValueError(
                f"Documents are read off one position a token, got position.shape="
                f"{tuple(position.shape)}: give [B, S], or Documents(lengths, seq_len) beside it."
            )
        if position.device.type != "cpu":
            raise ValueError(
                f"Documents are read on the host, got position.device={position.device}: pass "
                f"the data loader's tensor before it is moved, or Documents(lengths, seq_len)."
            )
        starts = position == 0
        steps = position.diff(dim=1)
        if not bool(starts[:, 0].all()) or not bool(((steps == 1) | starts[:, 1:]).all()):
            raise ValueError(
                f"Positions count up by one and restart at 0 with each document, got "
                f"position[:, :4]={position[:, :4].tolist()}: left padding and gaps have no "
                f"place in packed rows; pass Documents(lengths, seq_len) instead."
            )
        seq_len = position.shape[1]
        rows = [[*row.nonzero().flatten().tolist(), seq_len] for row in starts]
        return cls(tuple(tuple(b - a for a, b in pairwise(row)) for row in rows), seq_len)

    @classmethod
    def from_padded(cls, position: Tensor | None, padding: Tensor) -> "Documents":
        """Read the documents of rows that are padded on the right.

        Args:
            position: [B, S], restarting at 0 with each document; not read where there is padding.
                None for one document a row.
            padding: [B, S], bool, True for padding.
        Raises:
            ValueError: padding that tokens follow, or positions that `from_positions` refuses.
        """
        lengths = (~padding).sum(1)
        index = torch.arange(padding.shape[1], device=padding.device)
        if bool((padding != (index >= lengths[:, None])).any()):
            raise ValueError(
                f"Rows are padded on the right, got padding before tokens in rows "
                f"{(padding != (index >= lengths[:, None])).any(1).nonzero().flatten().tolist()}: "
                f"move their padding to the end."
            )
        rows: list[tuple[int, ...]] = []
        for row, length in enumerate(lengths.tolist()):
            if length == 0 or position is None:
                rows.append((length,) if length else ())
            else:
                rows.append(cls.from_positions(position[row : row + 1, :length]).lengths[0])
        return cls(tuple(rows), padding.shape[1])

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Sequence[int], seq_len: int) -> "Documents":
        """One row from its document boundaries: [N + 1] ints that start at 0."""
        return cls((tuple(b - a for a, b in pairwise(cu_seqlens)),), seq_len)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def padded(self, seq_len: int) -> "Documents":
        """The same documents in longer rows; the new tokens are padding."""
        return Documents(self.lengths, seq_len)

    def document(self) -> Tensor:
        """Index of each token's document in its row, -1 for padding: [B, S], int64."""
        return self._spread([list(range(len(row))) for row in self.lengths], PADDING)

    def starts(self) -> Tensor:
        """First position of each token's document; the token itself for padding: [B, S]."""
        firsts = [list(accumulate(row[:-1], initial=0)) if row else [] for row in self.lengths]
        starts = self._spread(firsts, PADDING)
        return torch.where(starts == PADDING, torch.arange(self.seq_len), starts)

    def ends(self) -> Tensor:
        """Last position of each token's document; the token itself for padding: [B, S]."""
        ends = self._spread([[end - 1 for end in accumulate(row)] for row in self.lengths], PADDING)
        return torch.where(ends == PADDING, torch.arange(self.seq_len), ends)

    def position_ids(self) -> Tensor:
        """What RoPE reads: 0 at the start of each document, 0 for padding: [B, S], int64."""
        return torch.arange(self.seq_len) - self.starts()

    def _spread(self, values: list[list[int]], padding: int) -> Tensor:
        """One value a document, repeated over its tokens."""
        out = torch.full((self.batch, self.seq_len), padding, dtype=torch.int64)
        for row, (lengths, row_values) in enumerate(zip(self.lengths, values, strict=True)):
            if lengths:
                spread = torch.tensor(row_values).repeat_interleave(torch.tensor(lengths))
                out[row, : spread.numel()] = spread
        return out
