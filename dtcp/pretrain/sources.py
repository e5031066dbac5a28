"""Where documents come from: the standard library's own source, a folder, or Hugging Face.

A source is a sequence of texts in a fixed order for each epoch, the same on every rank and every
mesh. Packing them into rows is the work of `data`.
"""

import json
import os
import random
import sys
import sysconfig
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Part = Literal["train", "validation", "all"]

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
HELD_OUT = 20  # one document in 20 is kept for validation
WINDOW = 4096  # documents in memory, to mix those of one file with others

NOT_THE_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data")
"""Folders of a Python: other people's packages, tests, and tables that would outweigh the code."""


class Source(Protocol):
    def documents(self, epoch: int) -> Iterator[str]:
        """Every document of the source once, in this epoch's order."""


@dataclass(frozen=True)
class TextFiles:
    """Documents of files on this machine: whole texts, parts of them, or the lines of a JSONL.

    Whether a document is held out for validation depends on its text alone, so training and
    validation never meet, whatever the order. Files, and then documents within a window, are
    shuffled anew each epoch.
    """

    files: tuple[Path, ...]
    part: Part = "all"
    separator: str = ""
    text_key: str = "text"
    longest: int = sys.maxsize
    """Characters; documents beyond it are left out."""
    seed: int = 0

    def documents(self, epoch: int) -> Iterator[str]:
        order = random.Random(self.seed + epoch)
        files = list(self.files)
        order.shuffle(files)
        texts = (text for file in files for text in self._read(file))
        return shuffled(filter(self._wanted, texts), order)

    def _read(self, file: Path) -> Iterator[str]:
        if file.suffix == ".jsonl":
            yield from self._read_lines(file)
            return
        text = file.read_text(encoding="utf-8", errors="replace")
        yield from text.split(self.separator) if self.separator else [text]

    def _read_lines(self, file: Path) -> Iterator[str]:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield json.loads(line)[self.text_key]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"A line of a JSONL file is an object with the key {self.text_key!r}, got "
                        f"{file}:{number}={line[:40]!r}: mend it, or set --dataloader.text_key."
                    ) from error

    def _wanted(self, text: str) -> bool:
        if not text.strip() or len(text) > self.longest:
            return False
        held_out = zlib.crc32(text.encode("utf-8", "replace")) % HELD_OUT == 0
        return self.part == "all" or held_out == (self.part == "validation")


def shuffled(documents: Iterator[str], order: random.Random) -> Iterator[str]:
    """The documents in another order, looking no further ahead than a window."""
    window: list[str] = []
    for document in documents:
        if len(window) < WINDOW:
            window.append(document)
            continue
        chosen = order.randrange(WINDOW)
        yield window[chosen]
        window[chosen] = document
    order.shuffle(window)
    yield from window


@dataclass(frozen=True)
class HuggingFace:
    """A dataset of the Hugging Face hub or of a local folder in its formats, streamed."""

    name: str
    subset: str | None
    split: str
    text_key: str = "text"
    seed: int = 0

    def documents(self, epoch: int) -> Iterator[str]:
        # The hub's library takes seconds to import, and most runs do without.
        from datasets import load_dataset

        rows = load_dataset(self.name, self.subset, split=self.split, streaming=True)
        for row in rows.shuffle(seed=self.seed + epoch):
            if self.text_key not in row:
                raise ValueError(
                    f"A row of {self.name} has the key {self.text_key!r}, got keys={sorted(row)}: "
                    f"set --dataloader.text_key."
                )
            yield row[self.text_key]


def standard_library(part: Part, seed: int = 0) -> TextFiles:
    """The source code of the running Python; each stretch without a blank line is a document.

    Every machine that runs this has it. A stretch is a method, a table or a comment, of a few
    hundred bytes, so that a row of a tiny model holds several documents.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _files_below(root, (".py",), skipped=NOT_THE_LIBRARY)
    if not files:
        raise ValueError(
            f"The standard library comes as source files, got none in folder={root}: "
            f"set --dataloader.dataset folder --dataloader.dataset_path PATH."
        )
    return TextFiles(files, part, separator="\n\n", longest=4096, seed=seed)


def folder(path: str | None, part: Part, *, text_key: str, seed: int = 0) -> TextFiles:
    """Text and JSONL files below a folder; each text file, or line of a JSONL, is a document.

    Raises:
        ValueError: no such folder, or nothing to read in it.
    """
    root = Path(path or "")
    if not path or not root.is_dir():
        raise ValueError(
            f"Data is read from a folder, got dataset_path={path}: no such folder; "
            f"set --dataloader.dataset_path."
        )
    suffixes = (*TEXT_SUFFIXES, ".jsonl")
    files = _files_below(root, suffixes)
    if not files:
        raise ValueError(
            f"A data folder holds files that end in {', '.join(sorted(suffixes))}, got none in "
            f"dataset_path={path}: convert them, or name another folder."
        )
    return TextFiles(files, part, text_key=text_key, seed=seed)


def _files_below(
    root: Path, suffixes: tuple[str, ...], skipped: Collection[str] = ()
) -> tuple[Path, ...]:
    """Files with one of the suffixes, sorted; folders of a skipped name are not entered."""
    paths: list[Path] = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]
        paths += [Path(parent, name) for name in names]
    return tuple(sorted(path for path in paths if path.suffix in suffixes and path.is_file()))
