"""Sinusoidal positions of models that count tokens by ids: fairseq's, as in M2M100 and its kin.

Such a module takes ids instead of positions: it counts those that are not padding, starting after
the padding id. On a mesh it is given the positions of the batch, and computes what its table would
hold for them, for rows of any length.
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

COUNTS = "create_position_ids_from_input_ids"
"""The method by which such a module counts."""


def is_position_table(module: nn.Module) -> bool:
    """Whether a module counts positions by ids and looks up sines for them."""
    parameters = inspect.signature(type(module).forward).parameters
    parts = (COUNTS, "get_embedding", "padding_idx", "weights", "embedding_dim")
    return all(hasattr(module, each) for each in parts) and "position_ids" not in parameters


@torch.no_grad()
def sines_of_positions(table: Any, ids: Tensor | None, positions: Tensor) -> Tensor:
    """What a table holds for positions, counted from 0, and zeros for padding: [B, L, D].

    Args:
        ids: [B, L]; None where a model is called with embeddings, none of which is padding.
        positions: [B, L].
    """
    half = table.embedding_dim // 2
    step = math.log(10000) / (half - 1)
    rates = torch.exp(torch.arange(half, device=positions.device).float() * -step)
    angles = (positions + table.padding_idx + 1).float()[..., None] * rates
    sines = torch.cat((angles.sin(), angles.cos()), dim=-1)
    sines = nn.functional.pad(sines, (0, table.embedding_dim % 2)).to(table.weights.dtype)
    return sines if ids is None else sines.masked_fill((ids == table.padding_idx)[..., None], 0)
