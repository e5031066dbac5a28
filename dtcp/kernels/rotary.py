"""Rotary positions: each pair of channels turned by an angle that grows with the position."""

import torch
from torch import Tensor


def rotate(x: Tensor, position_ids: Tensor, frequency: Tensor) -> Tensor:
    """Turn the pairs (d, d + D/2) of x; minus the position turns them back.

    Args:
        x: [B, L, H, D]; its dtype stays.
        position_ids: [B, L].
        frequency: [D / 2], radians per token of every pair.
    Raises:
        ValueError: positions of another rank, which could turn heads by those of tokens.
    """
    if position_ids.ndim != 2:
        raise ValueError(
            f"A token turns by one position, got position_ids.shape={tuple(position_ids.shape)} "
            f"with x.shape={tuple(x.shape)}: give [B, L]."
        )
    # Angles are fp32 whatever dtype the model has: bf16 tells positions apart up to 256 only.
    angle = position_ids[..., None].float() * frequency
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]  # [B, L, 1, D/2]
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
