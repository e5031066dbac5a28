"""Rows that a loader repeats at its end, so that all batch ranks have as many: without a loss.

accelerate completes the last rows of an epoch by its first ones. Their gradient, and their share of
an evaluation, would be another one than that of one process, which has no more rows.
"""

from typing import Any

from torch import Tensor

from dtcp.distributed.mesh import ParallelMesh
from dtcp.labels import IGNORED


def ignore_repeated(batch: Any, state: Any, mesh: ParallelMesh) -> bool:
    """Let rows that are repeated have no labels, in place; those of flattened batches do.

    Args:
        batch: the last one that was read, of this rank: labels [B, S].
        state: accelerate's GradientState, which knows the loader and whether it has ended.
    Returns:
        whether there were any, with labels.
    """
    ranks, labels = mesh.size("batch"), batch.get("labels")
    ended = state.in_dataloader and state.end_of_dataloader and state.remainder > 0
    if ranks == 1 or not ended or not isinstance(labels, Tensor) or labels.ndim != 2:
        return False
    rows = state.active_dataloader.total_batch_size // ranks
    own = max(state.remainder - mesh.rank("batch") * rows, 0)
    if len(labels) != rows or (labels[own:] == IGNORED).all():
        return False
    batch["labels"] = labels.clone()
    batch["labels"][own:] = IGNORED
    return True
