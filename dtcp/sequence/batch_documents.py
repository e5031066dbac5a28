"""All that a batch says about its documents, cross-checked in one place.

Documents come as lengths, boundaries, numbers per token or position ids that restart, and padding
as a mask. Whoever shards a batch reads them here, whatever the keys are called; two that disagree
are refused by row and token, since one of them would be silently wrong.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtcp.sequence.arguments import WHOLE_NUMBERS, check_tensor
from dtcp.sequence.documents import PADDING, Documents, anywhere, check_padding_shape, count_true
from dtcp.sequence.neighbours import places_after
from dtcp.sequence.restarts import check_restarts

ID_KEYS = ("document_ids", "seq_idx")
"""Keys of document numbers per token, [B, S]; a negative number is padding."""
LENGTH_KEY = "seq_lens"
"""The key of document lengths, [B, N], filled up by 0 or by a negative number."""
BOUNDARY_KEYS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
"""Keys of boundaries: [N + 1] counted through all rows, one after another, or [B, N + 1]."""
LONGEST_KEYS = ("max_seqlen", "max_length_q", "max_length_k")
"""Keys of a number that no document is longer than."""
DOCUMENT_KEYS = (*ID_KEYS, LENGTH_KEY, *BOUNDARY_KEYS, *LONGEST_KEYS)
"""Keys that are read for documents and go no further."""


def documents_of_batch(
    batch: Mapping[str, Any],
    rows: int,
    seq_len: int,
    *,
    documents: Documents | None = None,
    name: str = "documents",
) -> Documents:
    """The documents of a batch, from every key that describes them: see `documents_and_counted`."""
    return documents_and_counted(batch, rows, seq_len, documents=documents, name=name)[0]


def documents_and_counted(
    batch: Mapping[str, Any],
    rows: int,
    seq_len: int,
    *,
    documents: Documents | None = None,
    name: str = "documents",
) -> tuple[Documents, tuple[bool, ...]]:
    """The documents of a batch, from every key that describes them.

    Explicit documents and DOCUMENT_KEYS say the same, or the batch is refused. Without them
    position_ids that restart say where documents start; without those each row is one document.
    Position ids that count on through the whole row say nothing of documents.

    Args:
        batch: maybe position_ids [B, S], [1, S] or [axes, B, S]; padding_mask [B, S], True or 1
            for padding, of any dtype; DOCUMENT_KEYS, as tensors or lists; block [B, S], as of
            `Coords`. None is left out.
        documents: of every row. What they have as a document may be padding; what the keys have
            ends where padding starts.
        name: where explicit documents come from.
    Returns:
        the documents; and for each row, whether position_ids are known to count the tokens of its
        documents from 0, whatever they hold in padding.
    Raises:
        ValueError: keys that contradict each other, named with row and token, or that describe
            no documents of these rows.
    """
    padding = read_padding_mask(batch.get("padding_mask"), rows, seq_len)
    sources = {} if documents is None else {name: documents}
    for key in DOCUMENT_KEYS:
        value = batch.get(key)
        if value is not None and key not in LONGEST_KEYS:
            sources[key] = _trimmed(_read(key, _tensor(key, value), rows, seq_len), padding)
    first = next(iter(sources), None)
    position_ids = batch.get("position_ids")
    chosen = Documents.of_batch(
        rows,
        seq_len,
        documents=None if first is None else sources[first],
        position_ids=position_ids,
        padding_mask=padding,
    )
    for key, other in sources.items():
        if key != first:
            _check_same(str(first), _trimmed(chosen, padding), key, _trimmed(other, padding))
    counted = (False,) * rows
    if position_ids is not None and first is not None:
        block = batch.get("block")
        counted = check_restarts(chosen, position_ids, padding, name=first, block=block)
    elif position_ids is not None:
        # Only position ids can say that a row has several documents.
        counted = (any(len(lengths) > 1 for lengths in chosen.lengths),) * rows
    _check_longest(batch, chosen)
    return chosen, counted


def read_padding_mask(mask: Any, rows: int, seq_len: int) -> Tensor | None:
    """A padding_mask as bool on the host: [B, S], True for padding; None for None.

    Raises:
        ValueError: another shape, or values other than 0 and 1: its meaning would be guessed.
    """
    if mask is None:
        return None
    mask = _tensor("padding_mask", mask).cpu()
    check_padding_shape(mask, rows, seq_len)
    if mask.dtype == torch.bool:
        return mask
    if not mask.dtype.is_floating_point and mask.numel():
        least, most = mask.aminmax()
        if least >= 0 and most <= 1:
            return mask.bool()
    odd = (mask != 0) & (mask != 1)
    if anywhere(odd):
        row, token = odd.nonzero()[0].tolist()
        raise ValueError(
            f"A padding_mask holds 1 for padding and 0 for tokens, got padding_mask[{row}, "
            f"{token}]={mask[row, token].item()}: give [B, S] of bool."
        )
    return mask.bool()


def documents_of_ids(ids: Tensor, *, name: str = "document_ids") -> Documents:
    """Read documents off their numbers: [B, S], one for each stretch of equal numbers.

    Args:
        ids: whole numbers in any order; a negative one is padding, at the end of a row.
    Raises:
        ValueError: padding before tokens, or a number that comes back after another one.
    """
    named: dict[str, Any] = {name: ids}
    check_tensor("Documents", shape="[B, S]", ndim=2, dtypes=WHOLE_NUMBERS, **named)
    ids = ids.cpu()
    seq_len, rows = ids.shape[1], []
    changes: list[list[int]] = [[0] for _ in ids]
    for row, token in torch.stack(places_after(np.not_equal, ids), dim=1).tolist():
        changes[row].append(token)
    for row, (numbers, bounds) in enumerate(zip(ids, changes, strict=True)):
        firsts = numbers[bounds].tolist()
        filled = [index for index, number in enumerate(firsts) if number >= 0]
        if filled != list(range(len(filled))):
            token = bounds[next(i for i, number in enumerate(firsts) if number < 0)]
            raise ValueError(
                f"Padding lies at the end of a row, got {name}[{row}, {token}]="
                f"{numbers[token].item()} before tokens: move it there, or number it as a document "
                f"beside a padding_mask."
            )
        seen: set[int] = set()
        for index in filled:
            if firsts[index] in seen:
                raise ValueError(
                    f"A document is one stretch of its row, got {name}[{row}, {bounds[index]}]="
                    f"{firsts[index]} again after another document: sort the tokens by document."
                )
            seen.add(firsts[index])
        ends = [*bounds, seq_len][: len(filled) + 1]
        rows.append(tuple(b - a for a, b in pairwise(ends)))
    return Documents(tuple(rows), seq_len)


def check_restarts_in_stretches(numbers: Tensor, position_ids: Tensor, *, name: str) -> None:
    """`check_restarts` for documents numbered from 1, where 0 is padding, in any place.

    Args:
        numbers: [B, S].
    """
    numbers = numbers.cpu()
    stretches = (numbers.diff(dim=1, prepend=numbers[:, :1]) != 0).cumsum(1)
    check_restarts(documents_of_ids(stretches), position_ids, numbers == 0, name=name)


def documents_of_lengths(lengths: Tensor, rows: int, seq_len: int) -> Documents:
    """Read documents off their lengths: [B, N], filled up by 0 or by a negative number."""
    named = {LENGTH_KEY: lengths}
    check_tensor("Documents", shape="[B, documents]", ndim=2, dtypes=WHOLE_NUMBERS, **named)
    if len(lengths) != rows:
        raise ValueError(
            f"The documents of each row are counted in a row of their own, got {LENGTH_KEY}.shape="
            f"{tuple(lengths.shape)} for {rows} rows: give [B, documents]."
        )
    return Documents(tuple(tuple(x for x in row if x > 0) for row in lengths.tolist()), seq_len)


def documents_of_boundaries(
    bounds: Tensor, rows: int, seq_len: int, *, name: str = "cu_seqlens"
) -> Documents:
    """Read documents off where they start and end.

    Args:
        bounds: [N + 1], from 0 and counted through all rows, one after another, as kernels of
            packed rows read them; or [B, N + 1], from 0 in every row. They do not descend; empty
            documents are skipped, and so are negative numbers, which fill up a buffer.
    Raises:
        ValueError: boundaries of another kind, or a document that two rows share.
    """
    named: dict[str, Any] = {name: bounds}
    check_tensor("Documents", shape="[N + 1] or [B, N + 1]", dtypes=WHOLE_NUMBERS, **named)
    if bounds.ndim not in (1, 2):
        raise ValueError(
            f"Boundaries ascend in one dim, got {name}.shape={tuple(bounds.shape)}: give [N + 1] "
            f"for all rows, or [B, N + 1]."
        )
    per_row = bounds.ndim == 2 and (rows == len(bounds))
    if bounds.ndim == 2 and not per_row:
        raise ValueError(
            f"Boundaries of every row stand in a row of their own, got {name}.shape="
            f"{tuple(bounds.shape)} for {rows} rows: give [N + 1] for all rows, or [B, N + 1]."
        )
    total = seq_len if per_row else rows * seq_len
    lists = bounds.tolist() if per_row else [bounds.tolist()]
    lists = [[x for x in row if x >= 0] for row in lists]
    for row, ends in enumerate(lists):
        if not ends or ends[0] != 0 or ends[-1] > total or any(b < a for a, b in pairwise(ends)):
            raise ValueError(
                f"Boundaries ascend from 0 to the {total} tokens they lie in, got {name}="
                f"{ends[:8]}{'..' if len(ends) > 8 else ''} in row {row}, up to "
                f"{max(ends, default=0)}: count them from the start of "
                f"{'each row' if per_row else 'the first row, through all rows'}."
            )
    if not per_row:
        lists = _split(lists[0], rows, seq_len, name)
    return Documents(tuple(tuple(b - a for a, b in pairwise(x) if b > a) for x in lists), seq_len)


def _tensor(key: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"A batch holds tensors or lists of equal lengths, got {key} of type "
            f"{type(value).__name__}: {error}."
        ) from None


def _read(key: str, value: Tensor, rows: int, seq_len: int) -> Documents:
    if key in ID_KEYS:
        if value.shape != (rows, seq_len):
            raise ValueError(
                f"A document's number stands at each of its tokens, got {key}.shape="
                f"{tuple(value.shape)} for {rows} rows of {seq_len}: give [B, S]."
            )
        return documents_of_ids(value, name=key)
    if key == LENGTH_KEY:
        return documents_of_lengths(value, rows, seq_len)
    return documents_of_boundaries(value, rows, seq_len, name=key)


def _split(bounds: Sequence[int], rows: int, seq_len: int, name: str) -> list[list[int]]:
    """Boundaries of all rows as those of each row, counted from its start."""
    out: list[list[int]] = [[0] for _ in range(rows)]
    for start, end in pairwise(bounds):
        row = start // seq_len
        if end == start:
            continue
        if end > (row + 1) * seq_len:
            raise ValueError(
                f"A document lies in one row, got {name} with a document of tokens {start} to "
                f"{end - 1}, from row {row}, token {start - row * seq_len} into the next row of "
                f"{seq_len} tokens: cut it there."
            )
        out[row].append(end - row * seq_len)
    return out


def _trimmed(documents: Documents, padding: Tensor | None) -> Documents:
    """Documents without the padding behind the last token of each row."""
    if padding is None or not anywhere(padding[:, -1:]):
        return documents
    if anywhere(padding[:, :-1] > padding[:, 1:]):
        index = torch.arange(1, documents.seq_len + 1)
        last = torch.where(padding, 0, index).amax(1).tolist()
    else:
        last = (documents.seq_len - count_true(padding)).tolist()
    rows = []
    for lengths, end in zip(documents.lengths, last, strict=True):
        ends = [min(x, end) for x in accumulate(lengths, initial=0)]
        rows.append(tuple(b - a for a, b in pairwise(ends) if b > a))
    return Documents(tuple(rows), documents.seq_len)


def _check_same(name: str, documents: Documents, other_name: str, other: Documents) -> None:
    if documents == other:
        return
    ours, theirs = documents.document(), other.document()
    row, token = (ours != theirs).nonzero()[0].tolist()
    said = [_said(x[row, token].item()) for x in (ours, theirs)]
    raise ValueError(
        f"A batch says once where its documents are, got token {token} of row {row} in "
        f"{said[0]} by {name} and in {said[1]} by {other_name}: correct one of them, or leave it "
        f"out."
    )


def _said(document: int | float) -> str:
    return "no document" if document == PADDING else f"document {document}"


def _check_longest(batch: Mapping[str, Any], documents: Documents) -> None:
    for key in LONGEST_KEYS:
        value = batch.get(key)
        if value is None:
            continue
        number = _tensor(key, value)
        named: dict[str, Any] = {key: number}
        check_tensor("The longest document", dtypes=WHOLE_NUMBERS, **named)
        if not number.numel():
            raise ValueError(f"{key} is a number, got {key}={value!r}: leave it out.")
        most = number.max().item()
        for row, lengths in enumerate(documents.lengths):
            longest = max(lengths, default=0)
            if longest > most:
                token = sum(lengths[: lengths.index(longest)])
                raise ValueError(
                    f"No document is longer than {key}, got {key}={most} with a document of "
                    f"{longest} tokens from token {token} of row {row}: correct it, or leave it "
                    f"out."
                )
