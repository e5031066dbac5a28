"""torch's writer of distributed checkpoints, into a folder that is complete or not there.

Every rank computes the checksums of its files while it writes them. The first rank, when all have
written, writes metadata and manifest and renames the folder: in the process that writes, so that
saves in the background end no other way.
"""

import contextlib
import io
import os
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import xxhash
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dtcp.checkpoint.metadata import NAME as METADATA
from dtcp.pretrain.manifest import FileRecord, Manifest, misfit
from dtcp.pretrain.saved_folders import SavedFolders


@dataclass(frozen=True)
class WrittenFile:
    """What a rank tells the first one about a file, beside torch's results."""

    name: str
    record: FileRecord


class CheckpointWriter(FileSystemWriter):
    """FileSystemWriter that writes into a folder beside, with a manifest, and renames it last.

    Args:
        name: of the folder to be, in the folder of `folders`.
        manifest: without files, the same on every rank.
    """

    def __init__(self, folders: SavedFolders, name: str, *, manifest: Manifest) -> None:
        self.folders, self.final, self.manifest = folders, folders.root / name, manifest
        super().__init__(folders.staging(name, manifest.save))
        self.fs = self.hashing = _Hashing()
        self.said = ""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        files = [cast("WriteResult", file) for file in self.hashing.written()]
        future: Future[list[WriteResult]] = Future()
        future.set_result([*results, *files])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when all others have written."""
        everything: list[Any] = [result for of_rank in results for result in of_rank]
        super().finish(metadata, [[x for x in everything if isinstance(x, WriteResult)]])
        files = [x for x in everything if isinstance(x, WrittenFile)] + self.hashing.written()
        records = {file.name.removesuffix(".tmp"): file.record for file in files}
        assert METADATA in records, sorted(records)
        staging = Path(self.path)
        manifest = replace(self.manifest, files=records)
        problem = misfit(staging, manifest)
        if problem:
            raise ValueError(f"Ranks write into one folder, which all hosts share, got {problem}")
        manifest.write(staging)
        self.said = self.folders.publish(staging, self.final)


class _Hashing(FileSystem):
    """A file system that remembers size and checksum of what is written through it."""

    def __init__(self) -> None:
        self._streams: list[tuple[Path, _HashedStream]] = []

    @contextlib.contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        with super().create_stream(path, mode) as stream:
            hashed = _HashedStream(stream)
            try:
                yield hashed
            except RuntimeError as error:
                # torch's archive, which is closed all the same, speaks of its own positions.
                raise hashed.failure or error from error
        self._streams.append((Path(path), hashed))

    def written(self) -> list[WrittenFile]:
        """Files that were closed since this was last asked."""
        streams, self._streams = self._streams, []
        return [
            WrittenFile(path.name, FileRecord(stream.size, stream.digest.hexdigest()))
            for path, stream in streams
        ]


class _HashedStream(io.IOBase):
    """A file that is written from its start to its end."""

    def __init__(self, stream: io.IOBase) -> None:
        self._stream, self.size, self.digest = stream, 0, xxhash.xxh3_64()
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.size += len(view)
        try:
            return self._stream.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def tell(self) -> int:
        return self._stream.tell()

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()
