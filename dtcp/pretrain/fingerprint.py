"""Identifies a run's data, in every checkpoint: a resumed run has to read the same.

A place in the data (epoch, document, offset) means nothing in other data: documents would be read
twice, or never. So the fingerprint is compared before the place is believed.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LISTED = 4096
"""Up to so many files a fingerprint names each; of more it keeps one digest."""
EDGE = 4096
"""Bytes read at either end of a file: a change in its middle alone goes unnoticed."""
NAMED = 3
"""Files that an error names."""


def fingerprints_of(files: Sequence[Path], root: Path | None) -> dict[str, str]:
    """Each file's size and checksum of its ends, by its path below the root.

    Times are left out, for a copy on another machine is the same data.
    """
    marks = {str(file.relative_to(root) if root else file): fingerprint_of(file) for file in files}
    if len(marks) <= LISTED:
        return marks
    digest = hashlib.sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()[:16]
    return {f"{len(marks)} files": digest}


def fingerprint_of(file: Path) -> str:
    """Size and checksum of the first and last bytes of a file."""
    with file.open("rb") as data:
        checksum = zlib.crc32(data.read(EDGE))
        size = data.seek(0, 2)
        data.seek(max(EDGE, size - EDGE))
        checksum = zlib.crc32(data.read(EDGE), checksum)
    return f"{size}-{checksum:08x}"


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, a phrase for each; empty if nothing does."""
    changed = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _changed_files(old, new)
        else:
            changed.append(f"{name} was {old!r} and is {new!r}")
    return changed


def _changed_files(old: dict[str, str], new: dict[str, str]) -> list[str]:
    groups = {
        "added": sorted(new.keys() - old.keys()),
        "removed": sorted(old.keys() - new.keys()),
        "changed": sorted(name for name in old.keys() & new.keys() if old[name] != new[name]),
    }
    return [f"{kind}: {_some(names)}" for kind, names in groups.items() if names]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
