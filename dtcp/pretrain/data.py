"""Documents to packed rows, shared out over the data-parallel ranks; the same on every mesh.

The rows of a run are one stream, whatever the mesh: documents follow each other, a row takes the
next S tokens, a document that does not fit goes on in the next row as a new one. A global
micro-batch is the next `ranks * local_batch_size` rows, and each data-parallel rank keeps its
share of them. So every rank packs every row (cheap beside a step), two meshes see the same data,
and a run resumed on another mesh goes on exactly where it stopped. A thread reads one micro-batch
ahead of the one in use.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from dtcp.torchtitan import compat as compat

import numpy as np
import torch
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader

from dtcp.pretrain.balanced_packing import balanced_in_windows, share, work_of
from dtcp.pretrain.fingerprint import changes
from dtcp.pretrain.packing import Cursor, Row, pack
from dtcp.pretrain.prefetch import Prefetcher
from dtcp.pretrain.progress import say
from dtcp.pretrain.sources import HuggingFace, Part, Source, folder, standard_library
from dtcp.pretrain.text_files import DataError
from dtcp.pretrain.tokenizer import Tokenizer
from dtcp.sequence.arguments import check_ints
from dtcp.sequence.documents import Documents


@dataclass(frozen=True)
class HostDocuments(Documents):
    """Documents that stay on the host: the validator moves whatever is in a batch."""

    def to(self, device: Any) -> "HostDocuments":
        return self


class MicroBatch(NamedTuple):
    """This rank's rows of a global micro-batch."""

    batch: dict[str, Any]
    labels: Tensor
    cursor: Cursor
    """Where the next micro-batch starts."""
    documents: tuple[str, str]
    """The first and the last one, of all ranks."""
    work: tuple[int, ...]
    """Keys that the tokens of each data-parallel rank see under a causal mask."""


Prepare = Callable[[dict[str, Any], Tensor], dict[str, Any]]
"""Turns a batch and its labels into what the trainer is given in the batch's place."""


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
        """The folder of text and JSONL files; the configuration of a Hugging Face dataset."""

        part: Part = "train"
        """Documents to read: one in twenty is held out for "validation"."""

        split: str = ""
        """Split of a Hugging Face dataset; by default the one named as `part`."""

        text_key: str = "text"
        """Key of the text in a JSONL line or a Hugging Face row."""

        infinite: bool = True
        """Start over after the last document; otherwise the last, partial row is dropped."""

        seed: int = 0
        """Seed of the order of the files; the same on every rank."""

        replace_invalid: bool = False
        """Read bytes of a folder's files that are not UTF-8 as U+FFFD, instead of refusing them."""

        balance_rows: int = 0
        """Deal the documents of this many rows out so that all have about the same work under a
        causal mask. As many as a micro-batch has, or more; micro-batches are less even where it is
        no multiple. 0 leaves documents in their order."""

        accept_changes: bool = False
        """Go on from a checkpoint of other data, at the same place in the new ones."""

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
        rows = dp_world_size * local_batch_size
        check_balance(config, rows)
        if config.balance_rows % rows:
            say(
                f"data        documents are dealt out among {config.balance_rows} rows, no "
                f"multiple of the {rows} of a micro-batch: some micro-batches are less even"
            )
        self.source = open_source(config)
        self.cursor = Cursor()
        self.last_read: tuple[str, ...] = ()
        """First and last document of the last micro-batch, to find out why a step failed."""
        self.last_work: tuple[int, ...] = ()
        """Work of each data-parallel rank in the last micro-batch."""
        self.prepare: Prepare | None = None
        """Called with each batch in the thread that reads it, while the one before it is used."""
        self._fingerprint: dict[str, Any] | None = None
        self._prefetched: Prefetcher[MicroBatch] | None = None

    def read_ahead(self) -> None:
        """Start on the first batch now, in the thread, before it is asked for."""
        self._prefetched = Prefetcher(self._micro_batches(self.cursor))
        self._prefetched.start()

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        started, self._prefetched = self._prefetched, None
        for each in started or Prefetcher(self._micro_batches(self.cursor)):
            # The place after the batch handed out: a checkpoint after its step must not repeat it.
            self.cursor, self.last_read, self.last_work = each.cursor, each.documents, each.work
            yield each.batch, each.labels

    def _micro_batches(self, start: Cursor) -> Iterator[MicroBatch]:
        rows: list[Row] = []
        empty = True
        for row in self._rows(start):
            rows.append(row)
            if len(rows) == self.ranks * self.rows_per_rank:
                yield self._micro_batch(rows)
                rows, empty = [], False
        if empty and start == Cursor():
            again = (
                "set --validator.steps to a number (it reads them again) or --validator.no-enable"
                if self.config.part == "validation"
                else "read them again (--dataloader.infinite)"
            )
            raise DataError(
                f"A step takes {self.ranks * self.rows_per_rank} rows of {self.seq_len} tokens, "
                f"got {len(rows)} from all documents of dataset={self.config.dataset}, "
                f"part={self.config.part}: add documents, take fewer or shorter rows, or {again}."
            )

    def _rows(self, start: Cursor) -> Iterator[Row]:
        rows = pack(
            self.source,
            self.tokenizer,
            self.seq_len,
            replace(start, taken=0),
            infinite=self.config.infinite,
            name=f"dataset={self.config.dataset}, part={self.config.part}",
        )
        window = self.config.balance_rows
        return balanced_in_windows(rows, start, window) if window else rows

    def fingerprint(self) -> dict[str, Any]:
        """What determines the rows of this loader: the documents, their order, how they are cut."""
        if self._fingerprint is None:
            self._fingerprint = {
                "dataset": self.config.dataset,
                **self.source.fingerprint(),
                "tokenizer": self.tokenizer.fingerprint(),
                "tokens of a row (--training.seq_len)": self.seq_len,
            }
            if self.config.balance_rows:
                rows = {"rows dealt out together": self.config.balance_rows}
                self._fingerprint |= rows
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        # One string, for a checkpoint has an entry for every leaf.
        state = asdict(self.cursor) | {"fingerprint": json.dumps(self.fingerprint())}
        if not self.config.balance_rows:
            del state["taken"]  # which older checkpoints do not have
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a place in the data, if they are the data it was a place in.

        Raises:
            ValueError: other data, naming what changed; unless `accept_changes` is set.
        """
        self._compare(json.loads(state_dict["fingerprint"]))
        self._prefetched = None  # which read from another place
        names = [field.name for field in fields(Cursor) if field.name in state_dict]
        self.cursor = Cursor(**{name: state_dict[name] for name in names})

    def _compare(self, before: dict[str, Any]) -> None:
        changed = changes(before, self.fingerprint())
        if not changed:
            return
        text = "; ".join(changed)
        if not self.config.accept_changes:
            raise ValueError(
                f"A resumed run reads the data it began with, got other data ({text}): bring them "
                f"back, or set --dataloader.accept_changes to go on at the same place in the new, "
                f"where some documents come twice or never."
            )
        say(f"data        changed and accepted: {text}")

    def _micro_batch(self, rows: Sequence[Row]) -> MicroBatch:
        """This rank's rows of a global micro-batch, as torchtitan wants them."""
        if self.config.balance_rows:
            shares = share(rows, self.ranks)
        else:
            each = self.rows_per_rank
            shares = [list(rows[first : first + each]) for first in range(0, len(rows), each)]
        mine = shares[self.rank]
        documents = HostDocuments(tuple(tuple(row.lengths) for row in mine), self.seq_len)
        batch = {
            "input": torch.from_numpy(np.stack([row.tokens for row in mine])),
            "positions": documents.position_ids(),
            "documents": documents,
        }
        labels = torch.from_numpy(np.stack([row.labels for row in mine]))
        if self.prepare is not None:
            batch = self.prepare(batch, labels)
        read = (rows[0].names[0], rows[-1].names[-1])
        work = tuple(sum(work_of(row.lengths) for row in part) for part in shares)
        return MicroBatch(batch, labels, rows[-1].next, read, work)


def check_balance(config: PackedDocuments.Config, rows: int) -> None:
    """Refuse to deal out documents among fewer rows than a micro-batch of all ranks has."""
    window = config.balance_rows
    check_ints("Rows dealt out together", balance_rows=window)
    if window and window < rows:
        raise ValueError(
            f"Documents are dealt out among the rows of a micro-batch or more, got "
            f"--dataloader.balance_rows={window} for {rows} rows: give {rows}, a multiple of it, "
            f"or 0 to leave documents in their order."
        )


def open_source(config: PackedDocuments.Config) -> Source:
    """The source a config names."""
    if config.dataset == "stdlib":
        return standard_library(config.part, config.seed)
    if config.dataset == "folder":
        return folder(
            config.dataset_path,
            config.part,
            text_key=config.text_key,
            seed=config.seed,
            replace_invalid=config.replace_invalid,
        )
    return HuggingFace(
        config.dataset,
        config.dataset_path,
        config.split or config.part,
        text_key=config.text_key,
        seed=config.seed,
    )
