"""Which document every token of a packed row belongs to, known on the host from lengths."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.arguments import BOOL, WHOLE_NUMBERS, are_whole, check_ints, check_tensor
from dtcp.sequence.host import on_host
from dtcp.sequence.neighbours import places_after

PADDING = -1
"""Stands for the document of a token that belongs to none."""


def anywhere(mask: Tensor) -> bool:
    """Whether a bool tensor is True somewhere; torch's own any takes ten times as long on CPUs."""
    return mask.numel() > 0 and bool(mask.view(torch.uint8).max())


def count_true(mask: Tensor) -> Tensor:
    """How many entries of each row are True: [B]; mask: [B, N] bool, on the host."""
    return torch.tensor([int(np.count_nonzero(row)) for row in mask.numpy()], dtype=torch.int64)


def restarts(position_ids: Tensor, padding: Tensor | None = None) -> bool:
    """Whether position ids start over somewhere among tokens, as they do in packed rows.

    Args:
        position_ids: [B, S] or [1, S]. Of [axes, B, S] the first axis is read, which stands still
            inside an image.
        padding: [B, S], True where position ids mean nothing.
    """
    # One pass over all tokens; the rest looks at the few that do not count on.
    if position_ids.ndim == 3:
        row, token = places_after(np.less, position_ids[0])
    else:
        row, token = places_after(np.less_equal, position_ids)
    if padding is None:
        return len(row) > 0
    padding = padding.bool().cpu()
    if len(padding) > position_ids.shape[-2]:  # one row of position ids stands for all
        return not bool((padding[:, token] | padding[:, token - 1]).all())
    return not bool((padding[row, token] | padding[row, token - 1]).all())


def check_documents(contract: str, documents: Any) -> None:
    """Refuse anything but Documents; the error begins with the contract."""
    if not isinstance(documents, Documents):
        raise TypeError(
            f"{contract}, got documents of type {type(documents).__name__}: give "
            f"Documents(lengths, seq_len), or Documents.single(rows, seq_len)."
        )


def check_padding_shape(padding_mask: Tensor, rows: int, seq_len: int) -> None:
    """Refuse a mask of other tokens than those of the batch."""
    if padding_mask.shape != (rows, seq_len):
        raise ValueError(
            f"A padding_mask marks the tokens of its batch, got padding_mask.shape="
            f"{tuple(padding_mask.shape)} for {rows} rows of {seq_len}: give [B, S]."
        )


@dataclass(frozen=True)
class Documents:
    """The documents of every row of a batch: lengths in tokens, first to last.

    Documents follow each other without gaps; what they leave of a row is padding, which belongs
    to no document and is seen by no token.

        lengths=((3, 4),), seq_len=8        document:     0 0 0 1 1 1 1 -1
                                            position_ids: 0 1 2 0 1 2 3  0
    """

    lengths: tuple[tuple[int, ...], ...]
    seq_len: int

    def __post_init__(self) -> None:
        check_ints("A row of documents", least=1, seq_len=self.seq_len)
        if not isinstance(self.lengths, tuple) or not all(
            isinstance(row, tuple) and are_whole(row) for row in self.lengths
        ):
            raise TypeError(
                f"Documents are a tuple of lengths for every row, in whole tokens, got lengths="
                f"{self.lengths!r}: give ((3, 4), (7,)) for two rows, of two documents and of one."
            )
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
    @on_host
    def of_batch(
        cls,
        rows: int,
        seq_len: int,
        *,
        documents: "Documents | None" = None,
        position_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> "Documents":
        """The documents of a batch, from all that the batch says of them.

        Explicit documents win; position ids that restart come next; without either a row is one
        document. What padding_mask marks belongs to none.

        Args:
            documents: explicit ones, whatever the position ids do.
            position_ids: [B, S], [1, S] or [axes, B, S]; read only without documents.
            padding_mask: [B, S], nonzero for padding.
        Raises:
            ValueError: documents of other rows; padding before a token of its document; position
                ids of another shape, or that restart but do not count each document from 0.
        """
        padding = None
        if padding_mask is not None:
            check_tensor("A batch", shape="[B, S]", ndim=2, padding_mask=padding_mask)
            check_padding_shape(padding_mask, rows, seq_len)
            padding = padding_mask.bool().cpu()
        if documents is None:
            if position_ids is not None:
                check_token_positions(position_ids, rows, seq_len, dtypes=WHOLE_NUMBERS)
            starting = _document_positions(position_ids, padding, rows)
            if padding is not None:
                documents = cls.from_padded(starting, padding)
            elif starting is not None:
                documents = cls.from_position_ids(starting)
            else:
                documents = cls.single(rows, seq_len)
        check_documents("The documents of a batch are Documents", documents)
        if (documents.batch, documents.seq_len) != (rows, seq_len):
            raise ValueError(
                f"Documents describe the rows of their batch, got documents of {documents.batch} "
                f"rows of {documents.seq_len} tokens for a batch of {rows} of {seq_len}: build "
                f"them from it."
            )
        if padding is not None:
            documents._check_padding(padding)
        return documents

    @classmethod
    def single(cls, batch: int, seq_len: int) -> "Documents":
        """One document per row, filling it."""
        check_ints("Rows of one document each", least=0, batch=batch)
        return cls(((seq_len,),) * batch, seq_len)

    @classmethod
    @on_host
    def from_position_ids(cls, position_ids: Tensor) -> "Documents":
        """Read documents off position ids that restart at 0 where a document starts.

        Args:
            position_ids: [B, S], on the host: reading a device tensor would stall the step.
        Raises:
            TypeError: position ids that are not a tensor of whole numbers.
            ValueError: a row that does not start at 0, or a position id that neither restarts nor
                continues (left padding, positions in an image grid).
        """
        check_tensor("Packed rows", shape="[B, S]", dtypes=WHOLE_NUMBERS, position_ids=position_ids)
        if position_ids.ndim != 2:
            raise ValueError(
                f"Documents are read off one position id per token, got position_ids.shape="
                f"{tuple(position_ids.shape)}: give [B, S], or Documents(lengths, seq_len) beside "
                f"it."
            )
        if position_ids.device.type != "cpu":
            raise ValueError(
                f"Documents are read on the host, got position_ids.device={position_ids.device}: "
                f"pass the data loader's tensor before it is moved, or Documents(lengths, seq_len)."
            )
        if not position_ids.shape[1]:
            raise ValueError(
                f"Documents are read off rows of one token or more, got position_ids.shape="
                f"{tuple(position_ids.shape)}: leave empty rows out."
            )
        seq_len = position_ids.shape[1]
        # One pass over all tokens. Between two places where they do not ascend, whole numbers
        # count up by one if the last is as far from the first as their places are.
        row, token = places_after(np.less_equal, position_ids)
        bounds = [[0] for _ in position_ids]
        for index, start in zip(row.tolist(), token.tolist(), strict=True):
            bounds[index].append(start)
        lengths = tuple(tuple(b - a for a, b in pairwise((*starts, seq_len))) for starts in bounds)
        places = [(index, start) for index, starts in enumerate(bounds) for start in starts]
        row, first = torch.tensor(places, dtype=torch.int64).view(-1, 2).unbind(1)
        count = torch.tensor([length for each in lengths for length in each], dtype=torch.int64)
        last = position_ids[row, first + count - 1].long()
        if bool((position_ids[row, first] != 0).any()) or bool((last != count - 1).any()):
            raise ValueError(
                f"Position ids count up by one and restart at 0 with each document, got "
                f"position_ids[:, :4]={position_ids[:, :4].tolist()}: left padding and gaps have "
                f"no place in packed rows; pass Documents(lengths, seq_len) instead."
            )
        return cls(lengths, seq_len)

    @classmethod
    @on_host
    def from_padded(cls, position_ids: Tensor | None, padding: Tensor) -> "Documents":
        """Read the documents of rows that are padded on the right.

        Args:
            position_ids: [B, S] or [1, S], restarting at 0 with each document; not read where
                there is padding. None for one document per row.
            padding: [B, S], bool, True for padding.
        Raises:
            TypeError: padding that is not bool.
            ValueError: padding that tokens follow, position ids of other rows, or such that
                `from_position_ids` refuses.
        """
        check_tensor("Padded rows", shape="[B, S]", ndim=2, dtypes=BOOL, padding=padding)
        if position_ids is not None:
            check_token_positions(position_ids, *padding.shape, dtypes=WHOLE_NUMBERS)
        lengths = padding.shape[1] - count_true(padding)
        followed = padding[:, :-1] > padding[:, 1:]
        if anywhere(followed):
            misplaced = followed.any(1)
            raise ValueError(
                f"Rows are padded on the right, got padding before tokens in rows "
                f"{misplaced.nonzero().flatten().tolist()}: move their padding to the end."
            )
        if position_ids is not None and position_ids.ndim == 2:
            position_ids = position_ids.expand(len(padding), -1)
        rows: list[tuple[int, ...]] = []
        for row, length in enumerate(lengths.tolist()):
            if length == 0 or position_ids is None:
                rows.append((length,) if length else ())
            else:
                tokens = position_ids[row : row + 1, :length]
                rows.append(cls.from_position_ids(tokens).lengths[0])
        return cls(tuple(rows), padding.shape[1])

    @classmethod
    @on_host
    def from_cu_seqlens(cls, cu_seqlens: Sequence[int] | Tensor, seq_len: int) -> "Documents":
        """One row from its document boundaries: [N + 1] ints that start at 0 and ascend.

        Raises:
            TypeError: boundaries that are not whole numbers: floats, bools, a tensor of these.
            ValueError: boundaries that start elsewhere, do not ascend or lie beyond the row. What
                fills up a buffer of boundaries is none: cut it off.
        """
        if isinstance(cu_seqlens, Tensor):
            dtypes = WHOLE_NUMBERS
            check_tensor("One row", shape="[N + 1]", ndim=1, dtypes=dtypes, cu_seqlens=cu_seqlens)
            cu_seqlens = cu_seqlens.tolist()
        if not isinstance(cu_seqlens, Sequence) or not are_whole(cu_seqlens):
            raise TypeError(
                f"The boundaries of a row's documents are whole numbers, got cu_seqlens="
                f"{cu_seqlens!r}: give [N + 1] ints that start at 0."
            )
        starts_at_0 = len(cu_seqlens) > 0 and cu_seqlens[0] == 0
        if not starts_at_0 or any(b <= a for a, b in pairwise(cu_seqlens)):
            raise ValueError(
                f"The boundaries of a row's documents start at 0 and ascend, got cu_seqlens="
                f"{list(cu_seqlens)}: give where each document starts and the last one ends, "
                f"without empty ones and without what fills up a buffer."
            )
        return cls((tuple(b - a for a, b in pairwise(cu_seqlens)),), seq_len)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def padded(self, seq_len: int) -> "Documents":
        """The same documents in longer rows; the new tokens are padding."""
        return self if seq_len == self.seq_len else Documents(self.lengths, seq_len)

    @on_host
    def document(self) -> Tensor:
        """Index of each token's document in its row, -1 for padding: [B, S], int64."""
        return self._spread([list(range(len(row))) for row in self.lengths], PADDING)

    @on_host
    def starts(self) -> Tensor:
        """Token index where each token's document starts; padding, its own: [B, S], int64."""
        firsts = [list(accumulate(row[:-1], initial=0)) if row else [] for row in self.lengths]
        starts = self._spread(firsts, PADDING)
        return torch.where(starts == PADDING, torch.arange(self.seq_len), starts)

    @on_host
    def ends(self) -> Tensor:
        """Token index of the last token of each token's document; padding, its own: [B, S]."""
        ends = self._spread([[end - 1 for end in accumulate(row)] for row in self.lengths], PADDING)
        return torch.where(ends == PADDING, torch.arange(self.seq_len), ends)

    @on_host
    def position_ids(self) -> Tensor:
        """What RoPE reads: 0 at the start of each document, 0 for padding: [B, S], int64."""
        return torch.arange(self.seq_len) - self.starts()

    def _check_padding(self, padding: Tensor) -> None:
        """Refuse padding before tokens of the same document, which would see it."""
        followed = padding[:, :-1] > padding[:, 1:]
        if not anywhere(followed):
            return
        document = self.document()
        followed &= (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
        if anywhere(followed):
            row, token = followed.nonzero()[0].tolist()
            raise ValueError(
                f"Padding lies behind the tokens of a document, got padding_mask[{row}, {token}]="
                f"True with a token of the same document after it: pad on the right, or give "
                f"documents that leave it out."
            )

    def _spread(self, values: list[list[int]], padding: int) -> Tensor:
        """One value per document, repeated for each of its tokens."""
        out = torch.full((self.batch, self.seq_len), padding, dtype=torch.int64)
        for row, (lengths, row_values) in enumerate(zip(self.lengths, values, strict=True)):
            if lengths:
                spread = torch.tensor(row_values).repeat_interleave(torch.tensor(lengths))
                out[row, : spread.numel()] = spread
        return out


def check_token_positions(
    position_ids: Tensor, rows: int, seq_len: int, *, dtypes: Collection[torch.dtype] = ()
) -> None:
    """Refuse position ids that are not a tensor, or not those of these rows.

    Args:
        dtypes: those that are read; empty for any.
    """
    check_tensor("A batch", shape="[B, S]", dtypes=dtypes, position_ids=position_ids)
    shape = tuple(position_ids.shape)
    if len(shape) not in (2, 3) or shape[-1] != seq_len or shape[-2] not in (1, rows):
        raise ValueError(
            f"Position ids are one per token, or one per token and axis, got position_ids.shape="
            f"{shape} for {rows} rows of {seq_len}: give [B, S], [1, S], or [axes, B, S]."
        )


def _document_positions(
    position_ids: Tensor | None, padding: Tensor | None, rows: int
) -> Tensor | None:
    """Position ids that say where documents start, [B, S]; None if they count each row through."""
    if position_ids is None:
        return None
    if not restarts(position_ids.cpu(), padding):
        return None
    if position_ids.ndim != 2:
        raise ValueError(
            f"Documents are read off position_ids [B, S], got position_ids.shape="
            f"{tuple(position_ids.shape)} that restart: give documents beside them."
        )
    return position_ids.expand(rows, -1)
