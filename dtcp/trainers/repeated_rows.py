"""Rows that a loader repeats at its end, so that all batch ranks have equally many, get no loss.

accelerate fills up the last rows of an epoch with its first ones. With these, the gradient and an
evaluation would differ from those of one process, which repeats no rows.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dtcp.distributed.mesh import ParallelMesh
from dtcp.huggingface.documents import documents_of_hf_batch
from dtcp.labels import IGNORED
from dtcp.trainers.streams import note_remainder, rows_of_rank


def ignore_repeated(batch: Any, state: Any, mesh: ParallelMesh) -> bool:
    """Remove the labels of repeated rows, in place; packed and flattened rows keep them.

    A batch that was flattened into one row still shows them where each was one document.

    Args:
        batch: the last one that was read, of this rank: labels [B, S].
        state: accelerate's GradientState, which knows the loader and whether it has ended.
    Returns:
        whether there were any, with labels.
    """
    ranks, labels = mesh.size("batch"), batch.get("labels")
    ended = state.in_dataloader and state.end_of_dataloader
    if ranks == 1 or not ended or not isinstance(labels, Tensor) or labels.ndim != 2:
        return False
    note_remainder(state.active_dataloader)
    if state.remainder <= 0:
        return False
    rows = rows_of_rank(state.active_dataloader, ranks)
    own = max(state.remainder - mesh.rank("batch") * rows, 0)
    repeated = _tokens_from(own, rows, batch)
    if repeated is None or (labels[repeated] == IGNORED).all():
        return False
    batch["labels"] = labels.masked_fill(repeated, IGNORED)
    return True


def _tokens_from(own: int, rows: int, batch: Mapping[str, Any]) -> Tensor | None:
    """Which tokens belong to a row after the first `own`: [B, S]; None where nothing shows it."""
    labels: Tensor = batch["labels"]
    if len(labels) == rows:
        row = torch.arange(rows, device=labels.device)[:, None]
        return (row >= own).expand_as(labels)
    if len(labels) > 1:
        return None
    document = documents_of_hf_batch(batch).document().to(labels.device)
    return document >= own if int(document.max()) + 1 == rows else None
