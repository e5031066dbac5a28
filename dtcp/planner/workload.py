"""What is to be planned: the rows of a step, and what of the setup is fixed."""

from dataclasses import dataclass

import torch

from dtcp.distributed.mesh import Degrees
from dtcp.parallelize import ActivationCheckpoint
from dtcp.planner.setup import BF16, Precision, Setup
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.style import AttentionStyle


@dataclass(frozen=True)
class Workload:
    """What is to be run, and what of it is fixed.

    Args:
        documents: of one row.
        rows: of a step, on all ranks together.
        etp: as of Degrees; above 1, experts are split over all of tp.
        cuts_evenly: for train.py, which only takes rows that cp and tp cut into equal parts.
        attention, layout, checkpoint: use this one; None to try what there is.
        reduce_dtype: of strategies that are tried, as of AttentionStyle.
        reshard: as of Setup.
    """

    documents: Documents
    rows: int
    precision: Precision = BF16
    etp: int = 1
    attention: AttentionStyle | None = None
    layout: type[SequenceLayout] | None = None
    checkpoint: ActivationCheckpoint | None = None
    reduce_dtype: torch.dtype | None = None
    reshard: bool = True
    cuts_evenly: bool = False

    def parts(self, degrees: Degrees) -> int:
        """The number that the tokens of a row are to be a multiple of."""
        if not self.cuts_evenly:
            return 1
        return degrees.tp * (2 * degrees.cp if degrees.cp > 1 else 1)

    def check_cut(self, degrees: Degrees) -> None:
        """Refuse a mesh that train.py would not cut a row for.

        Raises:
            ValueError: naming a length that it would.
        """
        seq_len, parts = self.documents.seq_len, self.parts(degrees)
        if seq_len % parts:
            near = max(1, round(seq_len / parts)) * parts
            raise ValueError(
                f"A row is cut into {parts} parts by cp {degrees.cp} and tp {degrees.tp}, got "
                f"{seq_len} tokens: give a multiple as --seq-len, {near} say."
            )

    def takes(self, setup: Setup) -> bool:
        """Whether a setup is among those that are asked for."""
        return (
            self.attention in (None, setup.attention)
            and self.layout in (None, setup.layout)
            and self.checkpoint in (None, setup.checkpoint)
        )
