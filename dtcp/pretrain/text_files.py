"""Documents of one file, each with the place it stands at: texts, parts of texts, JSONL lines."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
SHOWN = 40  # characters of a broken line that an error repeats


class DataError(ValueError):
    """Data that cannot be read as expected; the text says where they are."""


@dataclass(frozen=True)
class Document:
    """A text, and where it comes from: a line of a file, or a row of a dataset."""

    text: str
    place: str


def read_documents(
    file: Path, separator: str, *, text_key: str, replace_invalid: bool
) -> Iterator[Document]:
    """The documents of a file in their order; time and memory are linear in its longest one.

    Args:
        separator: between the documents of a text; empty where all of it is one.
        text_key: key of the text in a line of a JSONL.
        replace_invalid: read bytes that are no UTF-8 as U+FFFD.
    Raises:
        DataError: naming the file, and the line or byte.
    """
    try:
        if file.suffix == ".jsonl":
            yield from _lines(file, text_key, replace_invalid)
        else:
            yield from _texts(file, separator, replace_invalid)
    except OSError as error:
        raise DataError(
            f"A data file can be read, got {file} ({error.strerror}): mend its rights, or name "
            f"another --dataloader.dataset_path."
        ) from error


def _texts(file: Path, separator: str, replace_invalid: bool) -> Iterator[Document]:
    text = _decoded(file.read_bytes(), f"{file}", replace_invalid)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not separator:
        yield Document(text, str(file))
        return
    for number, part in enumerate(text.split(separator), start=1):
        yield Document(part, f"{file}, part {number}")


def _lines(file: Path, text_key: str, replace_invalid: bool) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file}:{number}"
            text = _decoded(line, place, replace_invalid)
            if text and not text.isspace():
                yield Document(_text_of(text, place, text_key, replace_invalid), place)


def _decoded(data: bytes, place: str, replace_invalid: bool) -> str:
    """UTF-8, with or without the mark that some editors put first."""
    try:
        return data.decode("utf-8-sig", "replace" if replace_invalid else "strict")
    except UnicodeDecodeError as error:
        raise DataError(
            f"Data are UTF-8, got {place} with byte 0x{data[error.start]:02x} at offset "
            f"{error.start}: convert it, or set --dataloader.replace_invalid."
        ) from error


def _text_of(line: str, place: str, text_key: str, replace_invalid: bool) -> str:
    """The text that a line of a JSONL holds."""
    wanted = f"A line of a JSONL file is an object with a text under {text_key!r}, got {place}"
    remedy = "mend it, or set --dataloader.text_key."
    try:
        value: Any = json.loads(line)
    except RecursionError as error:
        raise DataError(f"{wanted}, nested too deep to be read: {remedy}") from error
    # Of numbers with thousands of digits as well, which json calls a mere ValueError.
    except ValueError as error:
        raise DataError(
            f"{wanted}={line[:SHOWN]!r} ({' '.join(str(error).split())[:80]}): {remedy}"
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{wanted}={line[:SHOWN]!r} of type {type(value).__name__}: {remedy}")
    if text_key not in value:
        raise DataError(f"{wanted} with keys={sorted(value)[:8]}: {remedy}")
    if _is_repeated(line, text_key):
        raise DataError(f"{wanted} where it stands more than once: {remedy}")
    text = value[text_key]
    if not isinstance(text, str):
        raise DataError(
            f"{wanted} with {text_key}={str(text)[:SHOWN]!r} of type {type(text).__name__}: "
            f"{remedy}"
        )
    return _without_surrogates(text, place, replace_invalid)


def _is_repeated(line: str, key: str) -> bool:
    """Whether an object has a key again: json keeps the last one, and drops the others."""
    if line.count(f'"{key}"') < 2:  # the price of most lines
        return False
    pairs = json.loads(line, object_pairs_hook=list)
    return sum(name == key for name, _ in pairs) > 1


def _without_surrogates(text: str, place: str, replace_invalid: bool) -> str:
    r"""JSON can write half a character (\ud800), which no encoding of a text can."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if replace_invalid:
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise DataError(
            f"A text is Unicode, got {place} with half of a surrogate pair at character "
            f"{error.start}: mend it, or set --dataloader.replace_invalid."
        ) from error
    return text
