"""Rows on their way between ranks: whatever has been started, `wait` gives the rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

MoveRows = Callable[[Tensor, list[int], list[int]], Tensor]
"""One all_to_all of rows: those to send, how many to each rank, how many from each."""


class RowTransfer(Protocol):
    """Rows on their way."""

    def wait(self) -> Tensor: ...


@dataclass(frozen=True)
class CompletedTransfer:
    """Rows that are here."""

    rows: Tensor

    def wait(self) -> Tensor:
        return self.rows


@dataclass(frozen=True)
class ChainedTransfer:
    """Rows on their way, and what becomes of them once they are here."""

    transfer: RowTransfer
    finish: Callable[[Tensor], Tensor]

    def wait(self) -> Tensor:
        return self.finish(self.transfer.wait())


StartRows = Callable[[Tensor, list[int], list[int]], RowTransfer]
"""Starts a transfer of rows: those to send, how many to each of some ranks, how many from each."""
