"""Where documents come from: the standard library's own source, a folder, or Hugging Face.

A source is a sequence of texts in a fixed order for each epoch, the same on every rank and every
mesh. Packing them into rows is the work of `data`.
"""

import os
import random
import sys
import sysconfig
import zlib
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from dtcp.pretrain.fingerprint import fingerprints_of
from dtcp.pretrain.text_files import TEXT_SUFFIXES, DataError, Document, read_documents

Part = Literal["train", "validation", "all"]

HELD_OUT = 20  # one document in 20 is kept for validation
WINDOW = 4096  # documents in memory, to mix those of one file with others
WINDOW_CHARACTERS = 1 << 26  # in memory, however few documents hold them
EMPTY_AFTER = 1 << 23  # bytes of files that are read to find one document of a part

NOT_THE_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data")
"""Folders of a Python: other people's packages, tests, and tables that would outweigh the code."""

HIDDEN = "hidden"
"""What stands for a suffix where hidden folders and texts are counted."""


class Source(Protocol):
    """Where documents come from: the same ones, in the same order, under one fingerprint."""

    def documents(self, epoch: int) -> Iterator[Document]:
        """Every document of the source once, in this epoch's order."""

    def fingerprint(self) -> dict[str, Any]:
        """What determines the documents and their order, by name, as JSON."""


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
    replace_invalid: bool = False
    """Read bytes that are no UTF-8 as U+FFFD; otherwise they are an error."""
    root: Path | None = None
    """The folder that the files lie in: a fingerprint names them from there."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Files of that folder that are not read: how many, by the end of their names."""

    def documents(self, epoch: int) -> Iterator[Document]:
        order = random.Random(self.seed + epoch)
        files = list(self.files)
        order.shuffle(files)
        return shuffled(self._wanted(files), order)

    def is_empty(self) -> bool:
        """Whether there is no document, as far as the first EMPTY_AFTER bytes of files tell."""
        read = 0
        for file in self.files:
            for _ in self._wanted([file]):
                return False
            read += file.stat().st_size
            if read > EMPTY_AFTER:
                return False
        return True

    def fingerprint(self) -> dict[str, Any]:
        return {
            "files": fingerprints_of(self.files, self.root),
            "part": self.part,
            "separator": self.separator,
            "text_key": self.text_key,
            "longest document": self.longest,
            "seed": self.seed,
            "invalid bytes": "replaced" if self.replace_invalid else "refused",
        }

    def _wanted(self, files: Collection[Path]) -> Iterator[Document]:
        for file in files:
            for document in read_documents(
                file, self.separator, text_key=self.text_key, replace_invalid=self.replace_invalid
            ):
                if self._is_wanted(document.text):
                    yield document

    def _is_wanted(self, text: str) -> bool:
        if not text or text.isspace() or len(text) > self.longest:
            return False
        if self.part == "all":
            return True
        held_out = zlib.crc32(text.encode("utf-8", "replace")) % HELD_OUT == 0
        return held_out == (self.part == "validation")


def shuffled(documents: Iterator[Document], order: random.Random) -> Iterator[Document]:
    """The documents in another order, looking no further ahead than a window."""
    window: list[Document] = []
    held = 0
    for document in documents:
        if len(document.text) > WINDOW_CHARACTERS // 8:
            yield document  # mixed enough by its own length, and no reason to empty the window
            continue
        window.append(document)
        held += len(document.text)
        while window and (len(window) > WINDOW or held > WINDOW_CHARACTERS):
            # The last one takes the place of the one that leaves: nothing is moved.
            chosen = order.randrange(max(1, len(window) - 1))
            window[chosen], window[-1] = window[-1], window[chosen]
            leaving = window.pop()
            held -= len(leaving.text)
            yield leaving
    order.shuffle(window)
    rest = deque(window)
    window.clear()
    while rest:
        yield rest.popleft()


@dataclass(frozen=True)
class HuggingFace:
    """A dataset of the Hugging Face hub or of a local folder in its formats, streamed."""

    name: str
    subset: str | None
    split: str
    text_key: str = "text"
    seed: int = 0

    def documents(self, epoch: int) -> Iterator[Document]:
        # The hub's library takes seconds to import, and most runs do without.
        from datasets import load_dataset

        number = -1
        try:
            rows = load_dataset(self.name, self.subset, split=self.split, streaming=True)
            for number, row in enumerate(rows.shuffle(seed=self.seed + epoch)):
                yield self._document(row, number)
        except DataError:
            raise
        # Clients of the network, the hub and each file format raise classes of their own, without a
        # common base, and which are installed is not known. Raised again, with dataset and row.
        except Exception as error:
            where = "before its first row" if number < 0 else f"after row {number} of the epoch"
            raise DataError(
                f"A dataset of Hugging Face can be streamed, got {self.name} "
                f"({self.subset or 'default'}, {self.split}), which failed {where} "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): look at "
                f"--dataloader.dataset, --dataloader.dataset_path and --dataloader.split; for a "
                f"validation name another split than training's, --validator.dataloader.split, or "
                f"set --validator.no-enable."
            ) from error

    def fingerprint(self) -> dict[str, Any]:
        local = Path(self.name)
        files = tuple(sorted(p for p in local.rglob("*") if p.is_file())) if local.is_dir() else ()
        return {
            "dataset": self.name,
            "subset": self.subset,
            "split": self.split,
            "files": fingerprints_of(files, local),
            "text_key": self.text_key,
            "seed": self.seed,
        }

    def _document(self, row: dict[str, Any], number: int) -> Document:
        place = f"row {number} of {self.name} (shuffled by seed {self.seed})"
        if self.text_key not in row:
            raise DataError(
                f"A row of {self.name} has the key {self.text_key!r}, got {place} with "
                f"keys={sorted(row)}: set --dataloader.text_key."
            )
        text = row[self.text_key]
        if not isinstance(text, str):
            raise DataError(
                f"The text of a row is a string, got {place} with {self.text_key}="
                f"{str(text)[:40]!r} of type {type(text).__name__}: set --dataloader.text_key."
            )
        return Document(text, place)


def standard_library(part: Part, seed: int = 0) -> TextFiles:
    """The source code of the running Python; each stretch without a blank line is a document.

    Every machine that runs this has it. A stretch is a method, a table or a comment, of a few
    hundred bytes, so that a row of a tiny model holds several documents.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    below, _ = _files_below(root, (".py",), skipped=NOT_THE_LIBRARY)
    files = tuple(path for path in below if path.is_file())
    if not files:
        raise ValueError(
            f"The standard library comes as source files, got none in folder={root}: "
            f"set --dataloader.dataset folder --dataloader.dataset_path PATH."
        )
    return TextFiles(
        files,
        part,
        separator="\n\n",
        longest=4096,
        seed=seed,
        # A few files are there to test other encodings.
        replace_invalid=True,
        root=root,
    )


def folder(
    path: str | None, part: Part, *, text_key: str, seed: int = 0, replace_invalid: bool = False
) -> TextFiles:
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
    files, others = _files_below(root, suffixes)
    _refuse_unreadable(files)
    if not files:
        raise ValueError(
            f"A data folder holds files that end in {', '.join(sorted(suffixes))}, got none in "
            f"dataset_path={path}: convert them, or name another folder."
        )
    return TextFiles(
        files,
        part,
        text_key=text_key,
        seed=seed,
        replace_invalid=replace_invalid,
        root=root,
        left_out=others,
    )


def _files_below(
    root: Path, suffixes: tuple[str, ...], skipped: Collection[str] = ()
) -> tuple[tuple[Path, ...], Mapping[str, int]]:
    """Files with one of the suffixes, sorted; and how many others there are, by suffix.

    Links lead to folders elsewhere, too; what lies below the root is read in its own place alone.
    Hidden folders and texts (.git, .cache, ._notes.txt) are what programs keep for themselves.

    Args:
        skipped: names of folders that are not entered.
    """
    paths: list[Path] = []
    others: Counter[str] = Counter()
    entered = [root.resolve()]
    for parent, folders, names in os.walk(root, onerror=_refuse_folder, followlinks=True):
        others.update(HIDDEN for name in folders if _is_hidden(name))
        # In the same order on every machine, for it decides which of two links is followed.
        folders[:] = [
            name
            for name in sorted(folders)
            if name not in skipped
            and not _is_hidden(name)
            and _is_entered(Path(parent, name), entered)
        ]
        others.update(HIDDEN for name in names if _is_hidden(name) and name.endswith(suffixes))
        shown = [name for name in names if not _is_hidden(name)]
        wanted = {name for name in shown if name.endswith(suffixes)}
        paths += [Path(parent, name) for name in wanted]
        others.update(os.path.splitext(name)[1] for name in shown if name not in wanted)
    return tuple(sorted(path for path in paths if path.suffix in suffixes)), others


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _is_entered(folder: Path, entered: list[Path]) -> bool:
    """Whether to walk through a folder here: not if it is a link to one that is walked elsewhere.

    Args:
        entered: the root and what links led to so far; gets one more.
    """
    if not folder.is_symlink():
        return True
    real = folder.resolve()
    if any(real.is_relative_to(each) for each in entered):
        return False
    within = next((each for each in entered if each.is_relative_to(real)), None)
    if within is not None:
        raise DataError(
            f"A data folder's links lead to folders of their own, got {folder}, which leads to "
            f"{real}, around {within}, whose texts are read already: remove one of the two links."
        )
    entered.append(real)
    return True


def _refuse_unreadable(files: Collection[Path]) -> None:
    """Refuse names of texts that are not files: they would be silently left out."""
    for path in files:
        if not path.is_file():
            what = f"a link to {os.readlink(path)}" if path.is_symlink() else "no regular file"
            raise DataError(
                f"A data folder's texts are files, got {path}, {what}: put the file in its place, "
                f"or remove it."
            )


def _refuse_folder(error: OSError) -> None:
    raise DataError(
        f"A data folder can be read with all that is below it, got {error.filename} "
        f"({error.strerror}): mend its rights, or move it elsewhere."
    ) from error
