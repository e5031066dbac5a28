"""Packs documents into rows of S tokens: one stream, linear in what it reads.

A document's ids come in pieces (`Tokenizer.pieces`), and what a row takes of them is copied once.
Documents are read ahead, some at a time, for a tokenizer that takes many at once on all cores:
every rank packs all rows of a run, and one core tokenizes fewer than many GPUs train on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from dtcp.pretrain.sources import Source
from dtcp.pretrain.text_files import DataError, Document
from dtcp.pretrain.tokenizer import Ids, Tokenizer

AHEAD = 256  # documents that are read and tokenized at once, at most
AHEAD_CHARACTERS = 1 << 23  # in them, after which no more are read; about 50 bytes for each


@dataclass(frozen=True)
class Cursor:
    """Where the stream stands: tokens before `offset` of this document are already in rows.

    Of rows whose documents are dealt out together, where these start, and how many were `taken`.
    """

    epoch: int = 0
    document: int = 0
    offset: int = 0
    taken: int = 0


@dataclass
class Row:
    """A row: S tokens, the token after each, the documents they come from, and what is next."""

    tokens: Ids
    labels: Ids
    filled: int = 0
    lengths: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """The number and place of each of its documents."""
    next: Cursor = Cursor()
    """Where the row after this one starts."""

    @classmethod
    def empty(cls, seq_len: int) -> "Row":
        return cls(np.empty(seq_len, np.int64), np.empty(seq_len, np.int64))

    def take(self, tokens: Ids, labels: Ids) -> int:
        """Copy as many tokens of a document as fit; returns how many."""
        count = min(len(tokens), len(self.tokens) - self.filled)
        place = slice(self.filled, self.filled + count)
        self.tokens[place], self.labels[place] = tokens[:count], labels[:count]
        self.filled += count
        return count

    def end_document(self, length: int, name: str) -> None:
        """The last `length` tokens taken were of one document."""
        self.lengths.append(length)
        self.names.append(name)

    def is_full(self) -> bool:
        return self.filled == len(self.tokens)


def pack(
    source: Source, tokenizer: Tokenizer, seq_len: int, start: Cursor, *, infinite: bool, name: str
) -> Iterator[Row]:
    """Full rows from a cursor on.

    Args:
        infinite: start over after the last document; otherwise a last, partial row is dropped.
        name: of the source, in errors.
    Raises:
        DataError: a document that cannot be read or tokenized, by its number and place; or a
            source that gives no token, which would be read forever.
    """
    row = Row.empty(seq_len)
    epoch = start.epoch
    while True:
        count = tokens = 0
        first = start.document if epoch == start.epoch else 0
        for number, document, pieces in _tokenized(source, tokenizer, epoch, first):
            count += 1
            if number < first:
                continue
            done = start.offset if (epoch, number) == (start.epoch, start.document) else 0
            called = f"document {number} of epoch {epoch} ({document.place})"
            length = 0  # of this document in this row
            for inputs, labels in _pairs(pieces, done, called):
                taken = 0
                while taken < len(inputs):
                    new = row.take(inputs[taken:], labels[taken:])
                    taken, done, length, tokens = (
                        taken + new,
                        done + new,
                        length + new,
                        tokens + new,
                    )
                    if row.is_full():
                        row.end_document(length, called)
                        row.next = Cursor(epoch, number, done)
                        yield row
                        row, length = Row.empty(seq_len), 0
            if length:
                row.end_document(length, called)
        _refuse_nothing(count, tokens, epoch == start.epoch and start != Cursor(epoch), name)
        if not infinite:
            return
        epoch += 1


def _numbered(source: Source, epoch: int) -> Iterator[tuple[int, Document]]:
    number = -1
    try:
        for number, document in enumerate(source.documents(epoch)):
            yield number, document
    except DataError as error:
        raise DataError(f"{error} (document {number + 1} or later of epoch {epoch})") from error


def _tokenized(
    source: Source, tokenizer: Tokenizer, epoch: int, first: int
) -> Iterator[tuple[int, Document, Iterator[Ids]]]:
    """Documents of an epoch and the pieces of their ids: of those before the `first`, none."""
    for group in _read_ahead(_numbered(source, epoch)):
        wanted = tokenizer.pieces_of([each.text for number, each in group if number >= first])
        for number, document in group:
            yield number, document, next(wanted) if number >= first else iter(())


def _read_ahead(documents: Iterator[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    """Documents in growing groups, so that the first row waits for few."""
    group: list[tuple[int, Document]] = []
    characters, room = 0, 1
    try:
        for each in documents:
            group.append(each)
            characters += len(each[1].text)
            if len(group) >= room or characters >= AHEAD_CHARACTERS:
                yield group
                group, characters, room = [], 0, min(2 * room, AHEAD)
    except DataError:
        # Documents before the error go into rows first, as if nothing were read ahead.
        if group:
            yield group
        raise
    if group:
        yield group


def _pairs(pieces: Iterator[Ids], skipped: int, called: str) -> Iterator[tuple[Ids, Ids]]:
    """Tokens of a document from its `skipped`-th on, and the token after each.

    The last token of a document is only ever a label.
    """
    before: Ids = np.empty(0, np.int64)
    try:
        for piece in pieces:
            ids = np.concatenate((before, piece)) if len(before) else piece
            left_out = min(skipped, max(0, len(ids) - 1))
            skipped -= left_out
            yield ids[left_out:-1], ids[left_out + 1 :]
            before = ids[-1:]
    # The tokenizers library, in Rust, raises Exception itself and no class of its own, so nothing
    # narrower would catch it. Raised again, with the document's name.
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise DataError(
            f"A document can be tokenized, got {called} ({type(error).__name__}: {text}): mend "
            f"it, or name another --tokenizer.folder."
        ) from error


def _refuse_nothing(documents: int, tokens: int, resumed: bool, name: str) -> None:
    """Refuse an epoch without a token, which others would follow forever."""
    if not documents:
        raise DataError(
            f"A data source has documents, got none from {name}: name another "
            f"--dataloader.dataset_path."
        )
    if not tokens and not resumed:
        raise DataError(
            f"A document has two tokens or more, one of them to predict, got none in {documents} "
            f"documents from {name}: name another --dataloader.dataset_path, or a "
            f"--tokenizer.folder whose tokenizer marks where documents start and end."
        )
