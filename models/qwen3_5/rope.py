"""A rotary embedding of part of a head, each frequency counted along one of three axes."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InterleavedRope:
    """Rotate the first `rotary_dim` channels of a head; the rest carry no position.

    A text token has one position. A token of an image or video has three: time, height and width.
    Of every three frequencies the second rotates with the height and the third with the width, as
    far as their sections reach, and all others with the time.

    Args:
        sections: frequencies of time, height and width; they sum to rotary_dim / 2.
    """

    rotary_dim: int
    theta: float
    sections: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.rotary_dim % 2 or sum(self.sections) != self.rotary_dim // 2:
            raise ValueError(
                f"InterleavedRope rotates pairs of channels, one frequency each, got "
                f"rotary_dim={self.rotary_dim}, sections={self.sections}: make the sections sum "
                f"to half of an even rotary_dim."
            )

    def angles(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for every token and frequency: [B, L, 1, rotary_dim / 2], fp32.

        Args:
            position_ids: [B, L], or [3, B, L]: time, height and width.
        Raises:
            ValueError: positions of another shape.
        """
        if position_ids.ndim == 2:
            by_frequency = position_ids[..., None]
        elif position_ids.ndim == 3 and position_ids.shape[0] == 3:
            by_frequency = self._by_frequency(*position_ids)
        else:
            raise ValueError(
                f"Positions are [B, L], or [3, B, L] for time, height and width, got "
                f"position_ids.shape={tuple(position_ids.shape)}: leave out the row of text "
                f"positions, for documents say the same."
            )
        pairs = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=position_ids.device)
        # Angles are fp32 whatever the model's dtype: bf16 tells positions apart only up to 256.
        angle = by_frequency.float() * (1.0 / self.theta ** (pairs / self.rotary_dim))
        return angle.cos()[:, :, None], angle.sin()[:, :, None]

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x [B, L, H, D] by `angles`; the dtype of x stays."""
        rotated, rest = x.split((self.rotary_dim, x.shape[-1] - self.rotary_dim), dim=-1)
        first, second = rotated.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
        parts = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat((*(part.to(x.dtype) for part in parts), rest), dim=-1)

    def _by_frequency(self, time: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """The position of each frequency: three of [B, L] -> [B, L, rotary_dim / 2]."""
        index = torch.arange(self.rotary_dim // 2, device=time.device)
        is_height = (index % 3 == 1) & (index < 3 * self.sections[1])
        is_width = (index % 3 == 2) & (index < 3 * self.sections[2])
        time_or_height = torch.where(is_height, height[..., None], time[..., None])
        return torch.where(is_width, width[..., None], time_or_height)
