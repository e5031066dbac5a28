"""Documents to packed rows, shared out over the data-parallel ranks; the same on every mesh.

The rows of a run are one stream, whatever the mesh: documents follow each other, a row takes the
next S tokens, a document that does not fit goes on in the next row as a new one. A global
micro-batch is the next `ranks * local_batch_size` rows, and each data-parallel rank keeps its
share of them. So every rank packs every row (cheap beside a step), two meshes see the same data,
and a run resumed on another mesh goes on exactly where it stopped.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from dtcp.torchtitan import compat as compat

import torch
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader

from dtcp.pretrain.sources import (
    HuggingFace,
    Part,
    Source,
    folder,
    standard_library,
)
from dtcp.pretrain.tokenizer import Tokenizer
from dtcp.sequence.documents import Documents


@dataclass(frozen=True)
class Cursor:
    """Where the stream stands: tokens before `offset` of this document are already in rows."""

    epoch: int = 0
    document: int = 0
    offset: int = 0


@dataclass(frozen=True)
class HostDocuments(Documents):
    """Documents that stay on the host: the validator moves whatever is in a batch."""

    def to(self, device: Any) -> "HostDocuments":
        return self


@dataclass
class Row:
    """A full row: S tokens, the token after each, and the documents they come from."""

    tokens: list[int]
    labels: list[int]
    lengths: list[int]


class PackedDocuments(BaseDataLoader):
    """Batches of packed rows, with each token's position in its document.

    The label of a token is the next token of its document, also where the document goes on in
    the next row: no label is lost and none crosses a document.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        dataset: str = "stdlib"
        """"stdlib" (this Python's own source), "folder", or the name of a Hugging Face dataset."""

        dataset_path: str | None = None
        """The folder of text and JSONL files; of a Hugging Face dataset the configuration."""

        part: Part = "train"
        """Documents to read: one in twenty is held out for "validation"."""

        split: str = ""
        """Split of a Hugging Face dataset; by default that of the same name as `part`."""

        text_key: str = "text"
        """Key of the text in a JSONL line or a Hugging Face row."""

        infinite: bool = True
        """Start over after the last document; otherwise the last, partial row is dropped."""

        seed: int = 0
        """Seed of the order of the files; the same on every rank."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: Tokenizer,
        seq_len: int,
        local_batch_size: int,
        **_: Any,
    ) -> None:
        self.config, self.tokenizer, self.seq_len = config, tokenizer, seq_len
        self.ranks, self.rank, self.rows_per_rank = dp_world_size, dp_rank, local_batch_size
        self.source = open_source(config)
        self.cursor = Cursor()

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        rows = []
        for row, next_cursor in self._rows(self.cursor):
            rows.append(row)
            if len(rows) == self.ranks * self.rows_per_rank:
                # Set before the batch is used: a checkpoint after its step must not repeat it.
                self.cursor = next_cursor
                yield self._batch(rows)
                rows = []

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.cursor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.cursor = Cursor(**state_dict)

    def _batch(self, rows: list[Row]) -> tuple[dict[str, Any], Tensor]:
        """This rank's rows of a global micro-batch, as torchtitan wants them."""
        mine = rows[self.rank * self.rows_per_rank : (self.rank + 1) * self.rows_per_rank]
        documents = HostDocuments(tuple(tuple(row.lengths) for row in mine), self.seq_len)
        batch = {
            "input": torch.tensor([row.tokens for row in mine]),
            "positions": documents.position_ids(),
            "documents": documents,
        }
        return batch, torch.tensor([row.labels for row in mine])

    def _rows(self, start: Cursor) -> Iterator[tuple[Row, Cursor]]:
        """Full rows from a cursor on, each with the cursor of the row after it."""
        row = Row([], [], [])
        for cursor, tokens in self._documents(start):
            while cursor.offset < len(tokens) - 1:
                piece = slice(cursor.offset, cursor.offset + self.seq_len - len(row.tokens))
                # The last token is only ever a label.
                inputs, labels = tokens[:-1][piece], tokens[1:][piece]
                row.tokens += inputs
                row.labels += labels
                row.lengths.append(len(inputs))
                cursor = replace(cursor, offset=cursor.offset + len(inputs))
                if len(row.tokens) == self.seq_len:
                    yield row, cursor
                    row = Row([], [], [])

    def _documents(self, start: Cursor) -> Iterator[tuple[Cursor, list[int]]]:
        """Token ids of each document from a cursor on, with the cursor at its first unused token.

        Raises:
            ValueError: the source has no document at all.
        """
        epoch = start.epoch
        while True:
            number = -1
            for number, text in enumerate(self.source.documents(epoch)):
                if (epoch, number) < (start.epoch, start.document):
                    continue
                first = (epoch, number) == (start.epoch, start.document)
                tokens = self.tokenizer.encode(text, add_bos=True, add_eos=True)
                yield Cursor(epoch, number, start.offset if first else 0), tokens
            if number < 0:
                raise ValueError(
                    f"A data source has documents, got none from dataset={self.config.dataset}, "
                    f"part={self.config.part}: name another --dataloader.dataset_path."
                )
            if not self.config.infinite:
                return
            epoch += 1


def open_source(config: PackedDocuments.Config) -> Source:
    """The source a config names."""
    if config.dataset == "stdlib":
        return standard_library(config.part, config.seed)
    if config.dataset == "folder":
        return folder(config.dataset_path, config.part, text_key=config.text_key, seed=config.seed)
    return HuggingFace(
        config.dataset,
        config.dataset_path,
        config.split or config.part,
        text_key=config.text_key,
        seed=config.seed,
    )
