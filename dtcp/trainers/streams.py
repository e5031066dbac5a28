"""Data sets of unknown length: all batch ranks read the same one, and end together.

accelerate gives each process shards of its own where a stream of `datasets` has enough. Such parts
end at different rows, and the others would wait for a rank that has none left.
"""

from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import IterableDataset


class WholeStream(IterableDataset[Any]):
    """A stream of which each batch rank takes its rows; counts those of the last pass.

    accelerate sees no stream of `datasets` in it, so every rank reads all rows, in the order of one
    process.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.rows = 0

    def __iter__(self) -> Iterator[Any]:
        self.rows = 0
        for row in self.stream:
            self.rows += 1
            yield row

    def __len__(self) -> int:
        return len(self.stream)

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # before it is set, as where a worker unpickles it
            raise AttributeError(name)
        return getattr(self.stream, name)


def read_whole(dataset: Any) -> Any:
    """A stream wrapped so that all ranks read all of it; a data set of known length as it is."""
    return WholeStream(dataset) if isinstance(dataset, IterableDataset) else dataset


def note_remainder(loader: Any) -> None:
    """Tell a loader of accelerate that has ended how many rows of a stream were left for it.

    Of a stream that workers read nothing is known here.
    """
    parts: Any = getattr(loader, "dataset", None)
    known = isinstance(parts, IterableDatasetShard) and isinstance(parts.dataset, WholeStream)
    if known and loader.num_workers == 0:
        ranks = parts.num_processes
        loader.remainder = parts.dataset.rows % (rows_of_rank(loader, ranks) * ranks)


def rows_of_rank(loader: Any, ranks: int) -> int:
    """How many rows a loader of accelerate gives each of `ranks` batch ranks at once."""
    parts: Any = getattr(loader, "dataset", None)
    if isinstance(parts, IterableDatasetShard):
        rows: int = parts.batch_size
        return rows // ranks if parts.split_batches else rows
    total: int = loader.total_batch_size
    return total // ranks
