"""Files that a folder names, and that lie in it."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path


def regular_file(folder: Path, name: object, *, also: Iterable[Path] = ()) -> tuple[Path, int]:
    """The file of a folder by its plain name, and its size in bytes.

    Args:
        also: folders that a link may lead to besides.
    Raises:
        ValueError: a path where a name should stand, a link that leads out of the folder, no such
            file, or one that is no regular file (opening a pipe would wait for ever).
    """
    if not isinstance(name, str) or Path(name).name != name or "\0" in name:
        raise ValueError(
            f"A folder names its files by plain names, got {name!r} in {folder}: nothing was read."
        )
    path = folder / name
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path} is missing ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file")
    real = path.resolve()
    if not any(real.is_relative_to(root.resolve()) for root in (folder, *also)):
        raise ValueError(f"{path} is a link that leads out of its folder, to {real}")
    return path, status.st_size
