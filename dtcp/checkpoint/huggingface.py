"""Weights in a Hugging Face folder: safetensors only, of the files that the folder says it has."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dtcp.checkpoint.confined import regular_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafeHuggingFaceReader(HuggingFaceStorageReader):
    """torch's reader, of the files that the index names; without an index, of all safetensors.

    Args:
        path: a folder as `save_pretrained` writes it, or a snapshot in the hub's cache.
    Raises:
        ValueError: a file that is missing, damaged, outside of the folder or not safetensors; a
            tensor that two files hold.
    """

    def __init__(self, path: str | os.PathLike[str], thread_count: int = 1) -> None:
        super().__init__(os.fspath(path), thread_count)
        files = weight_files(Path(path))
        file_of_tensors(files)
        self.fs = _Listed(files)
        self._parsed = super().read_metadata()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self.fs = _Listed(weight_files(Path(checkpoint_id)))
        super().reset(checkpoint_id)
        self._parsed = super().read_metadata()

    def read_metadata(self) -> Metadata:
        return self._parsed

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor in the folder, by its name there."""
        entries = self._parsed.state_dict_metadata.items()
        return {name: x.size for name, x in entries if isinstance(x, TensorStorageMetadata)}


class _Listed(FileSystem):
    """A file system whose folder has these files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [str(file) for file in self.files]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order of name.

    Raises:
        ValueError: there are none, the index names one that is not there, or the folder has
            weights without and with an index, of which transformers reads the first.
    """
    there = sorted({path.name for path in folder.glob("*.safetensors")})
    has_index = (folder / INDEX).exists()
    names = sorted(set(_indexed(folder).values())) if has_index else there
    if not names:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        raise ValueError(
            f"Weights are read from safetensors, got {folder} "
            + (f"with {others[0]}, a pickle that may run code" if others else "without any")
            + ": convert it with save_pretrained(..., safe_serialization=True), or name another."
        )
    files = [regular_file(folder, name, also=_hub_blobs(folder))[0] for name in names]
    if SINGLE in there and SINGLE not in names:
        raise ValueError(
            f"A folder has its weights once, got {SINGLE} and {INDEX} of other files in {folder}: "
            f"remove the one that does not belong there."
        )
    return files


def _indexed(folder: Path) -> Mapping[str, Any]:
    path, _ = regular_file(folder, INDEX, also=_hub_blobs(folder))
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        if not isinstance(weight_map, dict) or not all(map(str, weight_map.values())):
            raise ValueError("weight_map is not a map of names")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"An index maps tensors to files, got {path} ({error})") from error
    return weight_map


def _hub_blobs(folder: Path) -> tuple[Path, ...]:
    """Where the links of a snapshot in the hub's cache lead: models--x/snapshots/revision."""
    repository = folder.resolve().parent.parent
    in_cache = folder.resolve().parent.name == "snapshots"
    return (repository / "blobs",) if in_cache else ()


def file_of_tensors(files: Sequence[Path]) -> dict[str, Path]:
    """The file of each tensor, by its name.

    Raises:
        ValueError: a file that is damaged or not safetensors; a tensor that two files hold.
    """
    homes: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"Weights are read from whole safetensors files, got {file} ({error}): copy it "
                f"again."
            ) from error
        for name in names:
            if name in homes:
                raise ValueError(
                    f"A tensor is in one file of its folder, got {name} in {homes[name].name} and "
                    f"{file.name} of {file.parent}: remove the files that do not belong there."
                )
            homes[name] = file
    return homes
