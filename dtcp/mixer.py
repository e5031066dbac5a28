"""The places where tokens meet: what a model calls, and what a plan may take over.

Everything else in a transformer is per token and needs no context parallelism. A mixer has no
parameters and runs on one device as it stands; a style replaces how it is carried out over a mesh
axis, and no other line of the model knows.

A mixer reads `metadata`: what the batch brings, made once on the host (`batch_metadata`), by mixer
kind. A model takes tables as an argument and hands them through.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.compile import assert_in_graph
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.masks import Coords

BatchMetadata = Mapping[str, Sequence[Tensor]]


class Mixer(nn.Module):
    """A module in which tokens read each other."""

    metadata_key: str
    style: Any = None
    """What has taken the mixer over, once something has."""

    def make_metadata(self, coords: Coords, layout: SequenceLayout | None) -> Sequence[Tensor]:
        """What this mixer reads of a batch; `coords` are the whole rows', in position order."""
        raise NotImplementedError

    def alone(self, *args: Any, **kwargs: Any) -> Tensor:
        """The forward if no token read another: of q, k, v the own value, once a query head."""
        q, _, v = args[:3]
        own: Tensor = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
        return own


def position_ids_of(coords: Coords) -> Tensor:
    """What rotary angles are counted by: [B, S] int32.

    Raises:
        ValueError: positions on several axes: a mixer that rotates knows one a token.
    """
    if coords.position_ids is None:
        return (coords.token_index - coords.start).to(torch.int32)
    rows, position_ids = coords.token_index.shape[0], coords.position_ids
    if position_ids.ndim == 2 and position_ids.shape[0] == 1:
        position_ids = position_ids.expand(rows, -1)
    if position_ids.shape != coords.token_index.shape:
        raise ValueError(
            f"A mixer that makes keys where they are read rotates by one position a token, got "
            f"position_ids.shape={tuple(position_ids.shape)}: give [B, S] = "
            f"{tuple(coords.token_index.shape)}, or [1, S]."
        )
    return position_ids.to(torch.int32)


def check_position_ids(position_ids: Tensor, known: Tensor, seen: Tensor) -> None:
    """Stop where a model's positions are not those its batch's tables were made of.

    Queries and keys would be rotated by positions of two kinds, a wrong answer without a word.

    Args:
        position_ids: [B, L], what the model was given.
        known: [B, L], of the batch.
        seen: [B, L] bool, False for padding.
    """
    rows = {len(position_ids), len(known)} - {1}
    if position_ids.ndim != 2 or position_ids.shape[-1] != known.shape[-1] or len(rows) > 1:
        raise ValueError(
            f"A mixer that makes keys where they are read rotates by one position a token, got "
            f"position_ids.shape={tuple(position_ids.shape)}: give [B, L] = {tuple(known.shape)}."
        )
    same = (position_ids == known) | ~seen
    assert_in_graph(
        same.all(),
        "A model's positions are those of its batch, got others than the tables were made of: "
        "pass the batch's own, sharded with it (batch['position_ids'] of shard_batch), and give "
        "batch_metadata the same where they do not count a document's tokens.",
    )


def collect_metadata(
    model: nn.Module, coords: Coords, layout: SequenceLayout | None = None
) -> dict[str, Sequence[Tensor]]:
    """What the mixers of a model read of a batch: once a kind of mixer, on the host."""
    metadata: dict[str, Sequence[Tensor]] = {}
    for module in model.modules():
        if isinstance(module, Mixer) and module.metadata_key not in metadata:
            metadata[module.metadata_key] = module.make_metadata(coords, layout)
    return metadata


def batch_metadata(
    model: nn.Module,
    documents: Documents,
    *,
    prefix: Tensor | None = None,
    block: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> dict[str, Sequence[Tensor]]:
    """The tables of a batch of whole rows, for a model on one device.

    Args:
        position_ids: [B, S], what the model is given; None where it counts a document's tokens.
    """
    return collect_metadata(
        model, Coords.of(documents, prefix=prefix, block=block, position_ids=position_ids)
    )
