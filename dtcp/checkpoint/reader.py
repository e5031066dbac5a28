"""A reader of distributed checkpoints that runs nothing and leaves its folder for nothing."""

import os
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from dtcp.checkpoint.confined import regular_file
from dtcp.checkpoint.metadata import NAME, read_metadata


class SafeReader(FileSystemReader):
    """torch's FileSystemReader over metadata that are parsed as data.

    Metadata are read and checked when the reader is made: an error here is the folder's.

    Args:
        path: a checkpoint's folder, on a file system.
    Raises:
        ValueError: the folder's metadata name code, or files outside of it; or it is cut short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._parsed = _checked(Path(path))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        super().reset(checkpoint_id)
        if checkpoint_id:
            self._parsed = _checked(Path(checkpoint_id))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata of the whole checkpoint; those that torch writes per rank are not read."""
        return self._parsed


def _checked(folder: Path) -> Metadata:
    regular_file(folder, NAME)
    metadata = read_metadata(folder)
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        name = info.relative_path
        ends[name] = max(ends.get(name, 0), info.offset + info.length)
    for name, end in ends.items():
        path, size = regular_file(folder, name)
        if size < end:
            raise ValueError(f"{path} is cut short: it has {size} bytes where {end} are described")
    return metadata
