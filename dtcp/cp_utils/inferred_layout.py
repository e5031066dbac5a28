"""Infer the layout of a sequence that other code has sharded, from the indices of its tokens."""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.collectives import all_gather
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.partition import Run, joined_runs


@dataclass(frozen=True)
class InferredLayout(SequenceLayout):
    """A layout in which some other sharder has put the tokens.

    Attributes:
        rank_runs: the runs of every rank, in slot order.
    """

    rank_runs: tuple[tuple[Run, ...], ...]

    def runs(self, rank: int) -> list[Run]:
        self._check_rank(rank)
        return list(self.rank_runs[rank])


def infer_layout(token_index: Tensor, axis: DeviceMesh, *, reader: str) -> SequenceLayout:
    """Infer a layout of which each rank knows its part; parts are gathered and read on the host.

    Args:
        token_index: [L] int64, the index of each local token in the whole row.
        reader: who asks, for errors.
    Raises:
        ValueError: indices that are not those of one row, each once.

    Traffic per rank: L (n - 1) int64.
    """
    rows = all_gather(token_index, axis, dim=0).view(axis.size(), -1).tolist()
    seq_len = axis.size() * len(rows[0])
    if sorted(index for row in rows for index in row) != list(range(seq_len)):
        raise ValueError(
            f"The ranks' tokens are those of one row, indices 0 to {seq_len - 1}, each once, got "
            f"others in {reader}: pass seq_index, for position_ids restart with documents and "
            f"stand still in images."
        )
    rank_runs = tuple(tuple(joined_runs([(i, i + 1) for i in row])) for row in rows)
    for known in (Contiguous, HeadTail):
        if seq_len % known.multiple(axis.size()) == 0:
            layout = known(seq_len, axis.size())
            if rank_runs == tuple(tuple(layout.runs(rank)) for rank in range(axis.size())):
                return layout
    return InferredLayout(seq_len, axis.size(), rank_runs)
