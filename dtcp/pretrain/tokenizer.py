"""Text to token ids: one token per byte, or the tokenizer of a Hugging Face folder."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtcp.torchtitan import compat as compat

import numpy as np
import numpy.typing as npt
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer

from dtcp.pretrain.text_files import DataError

BYTES = 256
BOS, EOS = BYTES, BYTES + 1

PIECE = 1 << 21
"""Characters that a tokenizer is given at once: its memory is a hundred times its text."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)

VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
"""Of these, those that hold a vocabulary: a tokenizer's folder has one of them."""

Ids = npt.NDArray[np.int64]


class Tokenizer(BaseTokenizer):
    """Bytes by default, so that a bare machine can train; a folder's tokenizer when named."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        folder: str = ""
        """Folder that holds tokenizer.json; empty for one token per byte."""

    def __init__(self, config: Config, *, tokenizer_path: str):
        super().__init__()
        self.folder = config.folder
        self.inner = _from_folder(config.folder) if config.folder else ByteTokenizer()
        self.bos_id, self.eos_id = self.inner.bos_id, self.inner.eos_id

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        return self.inner.encode(text, add_bos=add_bos, add_eos=add_eos)

    def pieces(self, text: str) -> Iterator[Ids]:
        """The ids of a document with its marks, in arrays that follow each other.

        A text of more than 2 M characters is cut into pieces before spaces, which tokens do not
        run across in most tokenizers, and not at all in that of bytes: memory stays that of the
        text, and time is linear.
        """
        if len(text) <= PIECE:
            yield np.array(self.encode(text, add_bos=True, add_eos=True), dtype=np.int64)
            return
        marks = [[] if mark is None else [mark] for mark in (self.bos_id, self.eos_id)]
        yield np.array(marks[0], dtype=np.int64)
        start = 0
        while start < len(text):
            end = _end_of_piece(text, start)
            yield self._unmarked(text[start:end])
            start = end
        yield np.array(marks[1], dtype=np.int64)

    def pieces_of(self, texts: Sequence[str]) -> Iterator[Iterator[Ids]]:
        """`pieces` of each; a folder's tokenizer takes all texts at once, on all cores."""
        short = [text for text in texts if len(text) <= PIECE]
        if isinstance(self.inner, ByteTokenizer) or len(short) < 2:
            return map(self.pieces, texts)
        try:
            encoded = iter(self.inner.tokenizer.encode_batch_fast(short))
        # The library, in Rust, raises Exception itself. Each text by itself, its own raises again.
        except Exception:  # noqa: BLE001
            return map(self.pieces, texts)
        return (
            iter([self._marked(next(encoded).ids)]) if len(text) <= PIECE else self.pieces(text)
            for text in texts
        )

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)

    def get_vocab_size(self) -> int:
        return self.inner.get_vocab_size()

    def largest_id(self) -> int:
        """The largest id that it gives; more than their number less one where some are unused."""
        if isinstance(self.inner, ByteTokenizer):
            return EOS
        return max(self.inner.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def fingerprint(self) -> str:
        """What distinguishes this tokenizer from another one."""
        if not self.folder:
            return "bytes"
        content = hashlib.sha256()
        for name in TOKENIZER_FILES:
            path = Path(self.folder, name)
            content.update(path.read_bytes() if path.is_file() else b"")
        return content.hexdigest()[:16]

    def _marked(self, ids: list[int]) -> Ids:
        """The ids that `encode` gives, from the library's, which may have marks already."""
        inner = self.inner
        first = [] if inner.hf_adds_bos or inner.bos_id is None else [inner.bos_id]
        last = [] if inner.hf_adds_eos or inner.eos_id is None else [inner.eos_id]
        return np.array([*first, *ids, *last], dtype=np.int64)

    def _unmarked(self, text: str) -> Ids:
        if isinstance(self.inner, ByteTokenizer):
            return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64)
        ids = self.inner.tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, dtype=np.int64)


class ByteTokenizer(BaseTokenizer):
    """UTF-8 bytes are ids 0 to 255; 256 opens a document and 257 closes it."""

    def __init__(self) -> None:
        super().__init__()
        self.bos_id, self.eos_id = BOS, EOS

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        return [BOS] * add_bos + list(text.encode("utf-8", "replace")) + [EOS] * add_eos

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < BYTES).decode("utf-8", "replace")

    def get_vocab_size(self) -> int:
        return BYTES + 2


def check_tokenizer_folder(folder: str) -> None:
    """Refuse a folder that holds no tokenizer, before any rank starts.

    Raises:
        ValueError: no such folder, no tokenizer in it, or one whose JSON is broken.
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"A tokenizer is read from a folder, got --tokenizer.folder {folder}: no such folder."
        )
    paths = [Path(folder, name) for name in TOKENIZER_FILES if Path(folder, name).is_file()]
    for path in paths:
        if path.suffix != ".json":
            continue
        try:
            json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise _broken(path, error) from error
    if not any(path.name in VOCABULARY_FILES for path in paths):
        raise ValueError(
            f"A tokenizer's folder holds tokenizer.json, or vocab.json with merges.txt, got "
            f"--tokenizer.folder {folder} without: name the folder that the model came in."
        )


def _from_folder(folder: str) -> HuggingFaceTokenizer:
    check_tokenizer_folder(folder)
    try:
        tokenizer = HuggingFaceTokenizer(tokenizer_path=folder)
    # The library's parser, in Rust, raises Exception itself and no class of its own. Raised again,
    # with the folder's name.
    except Exception as error:
        raise _broken(Path(folder), error) from error
    # Such settings are for models that read batches of short texts.
    tokenizer.tokenizer.no_truncation()
    tokenizer.tokenizer.no_padding()
    return tokenizer


def _broken(path: Path, error: BaseException) -> DataError:
    text = " ".join(str(error).split())[:200]
    return DataError(
        f"A tokenizer can be read, got {path} ({type(error).__name__}: {text}): fetch it anew, or "
        f"name another --tokenizer.folder."
    )


def _end_of_piece(text: str, start: int) -> int:
    """Before the last space of a piece, or at its full length where there is none near its end."""
    end = start + PIECE
    if end >= len(text):
        return len(text)
    space = text.rfind(" ", end - PIECE // 16, end)
    return end if space <= start else space
