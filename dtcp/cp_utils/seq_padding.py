"""Padding of one tensor along its sequence, as NeMo Automodel's Gemma 4 and DeepSeek-V4 name it.

Automodel has both functions in either file. Despite their names they change nothing in place.
"""

import torch
from torch import Tensor

from dtcp.rows import pad_end


def _pad_tensor_seq_dim_(
    tensor: Tensor, seq_dim: int, pad_len: int, value: float | int = 0
) -> Tensor:
    """The tensor with `value` on the right of its sequence; itself if there is nothing to add.

    Raises:
        ValueError: a tensor without that dim.
    """
    _check_dim(tensor, seq_dim)
    return pad_end(tensor, pad_len, value, dim=seq_dim)


def _pad_position_ids_seq_dim_(position_ids: Tensor, seq_dim: int, pad_len: int) -> Tensor:
    """Position ids with padding that counts on from the last one of each row.

    Raises:
        ValueError: a tensor without that dim, or without a token to count on from.
    """
    _check_dim(position_ids, seq_dim)
    if pad_len <= 0:
        return position_ids
    if not position_ids.shape[seq_dim]:
        raise ValueError(
            f"Padding counts on from the last position of a row, got position_ids of shape "
            f"{tuple(position_ids.shape)} without any: pad rows that have tokens."
        )
    steps = torch.arange(1, pad_len + 1, dtype=position_ids.dtype, device=position_ids.device)
    shape = [1] * position_ids.ndim
    shape[seq_dim] = pad_len
    last = position_ids.narrow(seq_dim, position_ids.shape[seq_dim] - 1, 1)
    return torch.cat((position_ids, last + steps.view(shape)), dim=seq_dim)


def _check_dim(tensor: Tensor, seq_dim: int) -> None:
    if not -tensor.ndim <= seq_dim < tensor.ndim:
        raise ValueError(
            f"The sequence is a dim of the tensor, got seq_dim={seq_dim} for shape "
            f"{tuple(tensor.shape)}: count it from 0, or from the end as -1."
        )
