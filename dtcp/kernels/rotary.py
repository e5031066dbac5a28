"""Rotary position embedding: pairs of channels turn by an angle proportional to the position."""

import torch
from torch import Tensor


def rotate(x: Tensor, position_ids: Tensor, frequency: Tensor) -> Tensor:
    """Rotate each pair of channels (d, d + D/2); negated `position_ids` rotate back.

    Args:
        x: [B, L, H, D]; the result has its dtype.
        position_ids: [B, L].
        frequency: [D / 2], radians per token, one per pair.
    Raises:
        ValueError: position_ids are not 2-D. Broadcasting could then rotate heads by the
            positions of tokens.

    From Su et al. 2021, RoFormer, section 3.4.2, https://arxiv.org/abs/2104.09864; pairs as in
    Hugging Face's Llama.
    """
    if position_ids.ndim != 2:
        raise ValueError(
            f"A token turns by one position, got position_ids.shape={tuple(position_ids.shape)} "
            f"with x.shape={tuple(x.shape)}: give [B, L]."
        )
    # Angles are fp32 whatever the model's dtype: bf16 has distinct integers up to 256 only.
    angle = position_ids[..., None].float() * frequency
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]  # [B, L, 1, D/2]
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def key_of_value(v: Tensor, key_scale: Tensor, position_ids: Tensor, frequency: Tensor) -> Tensor:
    """A key that is its value [B, L, G, D], scaled by [D] and rotated; in the value's dtype."""
    return rotate(v * key_scale, position_ids, frequency).to(v.dtype)
