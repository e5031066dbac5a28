"""Compressed sparse attention in a layout that it is not carried out on: operands move there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.distributed.relayout import RelayoutMetadata, apply_relayout
from dtcp.metadata import AttentionMetadata
from dtcp.mixer_positions import position_ids_of
from dtcp.sequence.coords import Coords
from dtcp.sequence.layout import SequenceLayout
from dtcp.sparse.metadata import SparseMetadata


@dataclass(frozen=True, eq=False)
class OwnTokens(AttentionMetadata):
    """The tokens that a rank is called with."""

    position_ids: Tensor  # [B, L] int32
    last: Tensor  # [B, L] int32, -1 for padding

    @classmethod
    def of(cls, coords: Coords, layout: SequenceLayout, rank: int) -> "OwnTokens":
        last = coords.token_index.masked_fill(coords.document < 0, -1).int()
        return cls(layout.shard(position_ids_of(coords), rank), layout.shard(last, rank))


@dataclass(frozen=True, eq=False)
class RelayoutSparseMetadata(AttentionMetadata):
    """What the mixer reads where its operands move to another layout."""

    there: RelayoutMetadata
    here: OwnTokens
    inside: SparseMetadata


def relayout_operands(parts: Sequence[Tensor], there: RelayoutMetadata, group: str) -> list[Tensor]:
    """All of [B, L, ...] to the layout inside, in one all-to-all, in the widest of their dtypes."""
    flat = [x.flatten(2) for x in parts]
    arrived = apply_relayout(torch.cat(flat, dim=-1), there, group)
    split = arrived.split([x.shape[-1] for x in flat], dim=-1)
    return [y.to(x.dtype).unflatten(-1, x.shape[2:]) for x, y in zip(parts, split, strict=True)]
