"""Prefetches rows of a data loader: shards them in a thread, while the step before runs.

The training loop is not involved: rows are recognized when the model is called with them.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dtcp._torch.tensors import changes_of
from dtcp.batch import PreparedBatch


@dataclass(frozen=True)
class _Coming:
    """Rows in preparation, and how often each of their tensors had been written to before."""

    rows: Mapping[str, Any]
    changes: Mapping[str, int]
    outcome: "Future[PreparedBatch]"

    def is_of(self, rows: Mapping[str, Any]) -> bool:
        """Whether these are the same tensors, and nobody has written to them since."""
        return rows.keys() == self.rows.keys() and all(
            x is self.rows[key] and _changes(x) == self.changes[key] for key, x in rows.items()
        )


class PrefetchedRows:
    """Prefetches rows for one caller, which takes them in the order in which they came.

    Args:
        prepare: all of a batch that needs no other rank and no device.
    """

    def __init__(self, prepare: Callable[[Mapping[str, Any]], PreparedBatch]) -> None:
        self._prepare = prepare
        self._thread: ThreadPoolExecutor | None = None
        self._coming: list[_Coming] = []
        self._taken_as_they_are = True

    def start(self, rows: Mapping[str, Any]) -> None:
        """Have rows made in the thread; what is raised there is raised where they are used."""
        if not self._taken_as_they_are:
            return
        if self._thread is None:
            # One for all batches: torch keeps a team of threads for each that computes.
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetched rows")
        changes = {key: _changes(x) for key, x in rows.items()}
        self._coming.append(_Coming(rows, changes, self._thread.submit(self._prepare, rows)))

    def take(self, rows: Mapping[str, Any]) -> Callable[[], PreparedBatch] | None:
        """A function that returns these rows prepared; None if they have not been started.

        If a loop calls the model with other rows than its loader's, as for a preference loss, none
        are prepared any more: it would be in vain.
        """
        for index, coming in enumerate(self._coming):
            if coming.is_of(rows):
                del self._coming[: index + 1]
                return coming.outcome.result
        if self._coming:
            self._taken_as_they_are = False
            self._coming.clear()
        return None


def _changes(x: Any) -> int:
    return changes_of(x) if isinstance(x, Tensor) else 0
