"""The layout of a sequence that somebody else has sharded, read off its tokens' places."""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.collectives import all_gather
from dtcp.sequence.layout import (
    Contiguous,
    HeadTail,
    Run,
    SequenceLayout,
)


@dataclass(frozen=True)
class Dealt(SequenceLayout):
    """Tokens as some sharder has dealt them: the runs of every rank, in slot order."""

    dealt: tuple[tuple[Run, ...], ...]

    def runs(self, rank: int) -> list[Run]:
        self._check_rank(rank)
        return list(self.dealt[rank])


def layout_of(place: Tensor, axis: DeviceMesh, *, reader: str) -> SequenceLayout:
    """The layout that every rank's places make up; gathered, and read on the host.

    Args:
        place: [L] int64, where each local token stands in the whole row.
        reader: who asks, for the error.
    Raises:
        ValueError: places that are not those of one row, each once.
    """
    rows = all_gather(place, axis, dim=0).view(axis.size(), -1).tolist()
    seq_len = axis.size() * len(rows[0])
    if sorted(p for row in rows for p in row) != list(range(seq_len)):
        raise ValueError(
            f"The ranks' tokens are the places 0 to {seq_len - 1} of a row, each once, got "
            f"others in {reader}: pass seq_index, for positions restart with documents and "
            f"stand still in images."
        )
    dealt = tuple(_runs(row) for row in rows)
    for known in (Contiguous, HeadTail):
        if seq_len % known.multiple(axis.size()) == 0:
            layout = known(seq_len, axis.size())
            if dealt == tuple(tuple(layout.runs(rank)) for rank in range(axis.size())):
                return layout
    return Dealt(seq_len, axis.size(), dealt)


def _runs(row: list[int]) -> tuple[Run, ...]:
    """The longest runs of neighbours, in slot order."""
    runs: list[Run] = []
    for p in row:
        if runs and runs[-1][1] == p:
            runs[-1] = (runs[-1][0], p + 1)
        else:
            runs.append((p, p + 1))
    return tuple(runs)
