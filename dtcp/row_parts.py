"""A rank's part of rows that may be shorter than their layout, and what masks read of them."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtcp.rows import MASK_FIELDS, Fill, Rows, pad_end
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.memory import Memory
from dtcp.sequence.row_layouts import RowLayouts

MOST_SLICES = 16
"""Pieces that are sliced one by one; picking tokens costs as much as so many slices."""


def padded_coords(rows: Rows, documents: Documents, memory: Memory | None) -> Coords:
    """What masks and mixers read of the whole rows, padded as the documents are."""
    read: dict[str, Any] = dict(rows.for_masks)
    missing = documents.seq_len - rows.documents.seq_len
    for key, x in read.items():
        read[key] = pad_end(x.to(torch.int64), missing, MASK_FIELDS[key], dim=1)
    if "position_ids" in rows.tokens and not all(rows.counted):
        read["position_ids"] = pad_end(rows.tokens["position_ids"].cpu(), missing, 0, dim=-1)
    return Coords.of(documents, memory=memory, image_types=rows.image_types, **read)


def real_tokens(documents: Documents, layout: SequenceLayout, rank: int) -> Tensor:
    """Which of a rank's tokens are in a document: [B, L] bool."""
    rows = layout.rows if isinstance(layout, RowLayouts) else (layout,) * documents.batch
    real = torch.ones(len(rows), layout.shard_len, dtype=torch.bool)
    for row, own, lengths in zip(real, rows, documents.lengths, strict=True):
        if (used := sum(lengths)) < layout.seq_len:
            np.less(own.partition.tokens(rank), used, out=row.numpy())
    return real


def part_of_rows(
    x: Tensor,
    layout: SequenceLayout,
    rank: int,
    *,
    dim: int,
    rows_dim: int = 0,
    pad: int | float | bool | Fill,
) -> Tensor:
    """A rank's part of rows that may be shorter than their layout; the whole is never padded."""
    if isinstance(layout, RowLayouts):
        each = partial(_row_part, rank=rank, dim=dim, pad=pad)
        return layout.of_each_row(x, each, rows_dim=rows_dim)
    return _row_part(layout, x, rank=rank, dim=dim, pad=pad)


def _row_part(
    layout: SequenceLayout, x: Tensor, *, rank: int, dim: int, pad: int | float | bool | Fill
) -> Tensor:
    last = x.shape[dim] - 1
    if last + 1 == layout.seq_len:
        return _shard(layout, x, rank, dim)
    token_index = torch.from_numpy(layout.partition.tokens(rank)).to(x.device)
    part = x.index_select(dim, token_index.clamp(max=last))
    beyond = (token_index - last).clamp(min=0).view([-1 if d == dim else 1 for d in range(x.ndim)])
    if isinstance(pad, Fill):
        return part + beyond.to(x.dtype)
    return part.masked_fill(beyond > 0, pad)


def _shard(layout: SequenceLayout, x: Tensor, rank: int, dim: int) -> Tensor:
    """`layout.shard` outside of any graph: of many pieces by token, which takes one call."""
    pieces = layout.partition
    if type(layout).shard is not SequenceLayout.shard:
        return layout.shard(x, rank, dim=dim)
    if len(pieces.of_owner(rank)) <= MOST_SLICES:
        before = (slice(None),) * dim
        places = [(*before, slice(*run)) for run in pieces.runs(rank)]
        if type(x) is Tensor and x.device.type == "cpu" and not x.is_floating_point():
            # In half of the time that torch takes.
            return torch.from_numpy(np.concatenate([x.numpy()[each] for each in places], axis=dim))
        return torch.cat([x[each] for each in places], dim=dim)
    token_index = torch.from_numpy(pieces.tokens(rank)).to(x.device)
    if x.shape[:dim].numel() != 1:
        return x.index_select(dim, token_index)
    # Picked from the first dim, it takes a third of the time.
    part = x.reshape(x.shape[dim:]).index_select(0, token_index)
    return part.view(*x.shape[:dim], *part.shape)
