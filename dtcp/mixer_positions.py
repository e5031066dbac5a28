"""The position ids that mixers rotate by, where keys are made on the rank that reads them."""

import torch
from torch import Tensor

from dtcp._torch.compiler import assert_in_graph
from dtcp.sequence.coords import Coords


def position_ids_of(coords: Coords) -> Tensor:
    """What rotary angles are counted by: [B, S] int32.

    Raises:
        ValueError: position ids on several axes: a mixer that rotates knows one per token.
    """
    return rotated_positions(coords).to(torch.int32)


def rotated_positions(coords: Coords) -> Tensor:
    """`position_ids_of` in the dtype that they were given in, for who reads a few of them."""
    if coords.position_ids is None:
        return coords.token_index - coords.start
    shape, position_ids = (coords.rows, coords.seq_len), coords.position_ids
    if position_ids.ndim == 2 and position_ids.shape[0] == 1:
        position_ids = position_ids.expand(shape[0], -1)
    if position_ids.shape != shape:
        raise ValueError(
            f"A mixer that makes keys where they are read rotates by one position per token, got "
            f"position_ids.shape={tuple(position_ids.shape)}: give [B, S] = {shape}, or [1, S]."
        )
    return position_ids


def check_position_ids(position_ids: Tensor, expected: Tensor, seen: Tensor) -> None:
    """Stop where a model's position ids are not those its batch's metadata were made of.

    Queries and keys would be rotated by positions of two kinds, a wrong answer without a word.

    Args:
        position_ids: [B, L], what the model was called with.
        expected: [B, L], of the batch.
        seen: [B, L] bool, False for padding.
    """
    rows = {len(position_ids), len(expected)} - {1}
    if position_ids.ndim != 2 or position_ids.shape[-1] != expected.shape[-1] or len(rows) > 1:
        raise ValueError(
            f"A mixer that makes keys where they are read rotates by one position per token, got "
            f"position_ids.shape={tuple(position_ids.shape)}: give [B, L] = "
            f"{tuple(expected.shape)}."
        )
    same = ((position_ids == expected) | ~seen).all()
    if type(same) is Tensor and same.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(same):
            raise ValueError(OTHER_POSITIONS)
        return
    assert_in_graph(same, OTHER_POSITIONS)


OTHER_POSITIONS = (
    "A model's position_ids are those of its batch, got others than the metadata were made of: "
    "pass the batch's own, sharded with it (batch['position_ids'] of shard_batch), and give "
    "batch_metadata the same where they do not count a document's tokens."
)
