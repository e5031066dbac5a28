"""A rotary embedding of the last channels of a head, and its inverse."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Yarn:
    """Slow down the slow rotations of a model trained on short rows, keep the fast ones.

    Pairs that rotate more than `fast` times in original_seq_len tokens are kept, those that rotate
    less than `slow` times become slower by `factor`, and a ramp is in between. Scores are not
    rescaled. From Peng et al. 2023, https://arxiv.org/abs/2309.00071.
    """

    original_seq_len: int = 65_536
    factor: float = 16.0
    fast: float = 32.0
    slow: float = 1.0

    def __call__(self, period: Tensor, theta: float) -> Tensor:
        """Frequencies [D/2] from the pairs' periods divided by 2 pi, [D/2], fp32."""
        dim = 2 * len(period)
        low = max(math.floor(self._pair(self.fast, dim, theta)), 0)
        high = min(math.ceil(self._pair(self.slow, dim, theta)), dim - 1)
        pairs = torch.arange(len(period), dtype=torch.float32, device=period.device)
        kept = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
        return 1.0 / (self.factor * period) * (1 - kept) + 1.0 / period * kept

    def _pair(self, rotations: float, dim: int, theta: float) -> float:
        """The index, not a whole number, of the pair that rotates so often in original_seq_len."""
        return (
            dim
            * math.log(self.original_seq_len / (rotations * 2 * math.pi))
            / (2 * math.log(theta))
        )


@dataclass(frozen=True)
class TailRope:
    """Rotate adjacent pairs (2i, 2i + 1) of the last `dim` channels of a head."""

    dim: int
    theta: float
    yarn: Yarn | None = None

    def __call__(self, x: Tensor, position_ids: Tensor, *, back: bool = False) -> Tensor:
        """Rotate x [B, L, ..., D] by position_ids [B, L]; the dtype of x stays.

        Args:
            back: undo the rotation, as attention's output needs, whose values were rotated.
        """
        angle = position_ids[..., None].float() * self.frequencies(x.device)
        angle = angle.view(*position_ids.shape, *[1] * (x.ndim - 3), -1)
        cos, sin = angle.cos(), angle.sin() * (-1 if back else 1)
        unrotated, tail = x[..., : -self.dim], x[..., -self.dim :]
        wide = tail.to(torch.promote_types(x.dtype, torch.float32))
        even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
        return torch.cat((unrotated, pairs.flatten(-2).to(x.dtype)), dim=-1)

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per token of every pair: [D/2], fp32. Computed where used, as in Rope."""
        pairs = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device)
        period = self.theta ** (pairs / self.dim)
        return 1.0 / period if self.yarn is None else self.yarn(period, self.theta)
