"""What a saved folder says about itself: step, run, settings, data, and checksums of all files.

A manifest is written after all files are on disk, so a folder without one is not whole. It detects
files that were cut, changed, or taken from another save; it does not detect a forger, who can write
a manifest as well: that nothing in a folder is executed does not depend on it.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import xxhash

from dtcp.checkpoint.confined import regular_file

NAME = "manifest.json"
FORMAT = 1
BLOCK = 1 << 20
SMALL = 1 << 24
"""Bytes up to which a file's checksum is compared even if checksums are switched off."""

Holds = Literal["state", "weights", "huggingface"]


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written: its size in bytes, and the xxh3_64 of its content."""

    size: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Args:
        run: id of the run that wrote it, kept when the run goes on from a checkpoint.
        save: id of this save; no two folders share one.
        holds: the whole state, or weights only, in torch's format or as Hugging Face safetensors.
        config: every setting of the run by its dotted name, as text.
        data: what the data were, as the loader describes them.
    """

    step: int
    run: str
    save: str
    holds: Holds
    config: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it into a folder and onto the disk."""
        # As it will be read: keys are text, tuples are lists.
        body = json.loads(json.dumps({"format": FORMAT, **asdict(self)}))
        text = json.dumps({**body, "checksum": _digest(body)}, indent=1)
        with open(folder / NAME, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        ValueError: there is none, or it was changed; worded for the middle of a sentence.
    """
    if not (folder / NAME).exists():
        raise ValueError(f"{folder / NAME} is missing: its save was cut short, or not ours")
    path, _ = regular_file(folder, NAME)
    try:
        body = json.loads(path.read_bytes())
        written = body.pop("checksum")
        if written != _digest(body):
            raise ValueError("its checksum is another")
        if body.pop("format") != FORMAT:
            raise ValueError("it is of another version")
        files = {name: FileRecord(**record) for name, record in body.pop("files").items()}
        return Manifest(files=files, **body)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is cut short or was changed ({error})") from error


def checksum(path: Path) -> str:
    """xxh3_64 of a file, in hexadecimal digits."""
    digest, block = xxhash.xxh3_64(), memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def record_files(folder: Path, *suffixes: str) -> dict[str, FileRecord]:
    """Records of files that other code wrote, read again for it; by suffix, or all of a folder."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != NAME)
    return {
        path.name: FileRecord(path.stat().st_size, checksum(path))
        for path in paths
        if not suffixes or path.name.endswith(suffixes)
    }


def misfit(folder: Path, manifest: Manifest) -> str:
    """Why the files of a folder are not those of its manifest, by name and size; or nothing."""
    for name, record in manifest.files.items():
        try:
            path, size = regular_file(folder, name)
        except ValueError as error:
            return str(error)
        if size != record.size:
            return f"{path} has {size} bytes where {record.size} were saved"
    return ""


def changed_file(folder: Path, manifest: Manifest, names: Iterable[str]) -> str:
    """Why one of these files is not what was saved, by checksum; or nothing."""
    for name in names:
        try:
            actual = checksum(folder / name)
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
        if actual != manifest.files[name].checksum:
            return f"{folder / name} is not what was saved, by its checksum"
    return ""


def small_files(manifest: Manifest) -> list[str]:
    """Files whose checksum costs nothing: metadata among them."""
    return [name for name, record in manifest.files.items() if record.size <= SMALL]


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems have no such call for folders: names are there after a rename.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64(json.dumps(body, sort_keys=True).encode()).hexdigest()
