"""Rotary positions on the last channels of a head, and their way back."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Yarn:
    """Stretch the slow rotations of a model trained on short rows, keep the fast ones.

    Pairs that turn more than `fast` times in original_seq_len tokens are kept, those that turn
    less than `slow` times are slowed down by `factor`, a ramp lies between. Scores are not
    rescaled. From Peng et al. 2023, https://arxiv.org/abs/2309.00071.
    """

    original_seq_len: int = 65_536
    factor: float = 16.0
    fast: float = 32.0
    slow: float = 1.0

    def __call__(self, period: Tensor, theta: float) -> Tensor:
        """Frequencies for the periods [D/2] of the pairs, over 2 pi, fp32."""
        dim = 2 * len(period)
        low = max(math.floor(self._pair(self.fast, dim, theta)), 0)
        high = min(math.ceil(self._pair(self.slow, dim, theta)), dim - 1)
        pairs = torch.arange(len(period), dtype=torch.float32, device=period.device)
        kept = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
        return 1.0 / (self.factor * period) * (1 - kept) + 1.0 / period * kept

    def _pair(self, turns: float, dim: int, theta: float) -> float:
        """The pair that turns so often in the original length; between two pairs, in general."""
        return dim * math.log(self.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclass(frozen=True)
class TailRope:
    """Rotate pairs of neighbours (2i, 2i + 1) among the last `dim` channels of a head."""

    dim: int
    theta: float
    yarn: Yarn | None = None

    def __call__(self, x: Tensor, position_ids: Tensor, *, back: bool = False) -> Tensor:
        """Rotate x [B, L, ..., D] by the angles of position [B, L]; the dtype of x stays.

        Args:
            back: undo the rotation: what attention's output needs, whose values were rotated.
        """
        angle = position_ids[..., None].float() * self.frequencies(x.device)
        angle = angle.view(*position_ids.shape, *[1] * (x.ndim - 3), -1)
        cos, sin = angle.cos(), angle.sin() * (-1 if back else 1)
        kept, turned = x[..., : -self.dim], x[..., -self.dim :]
        wide = turned.to(torch.promote_types(x.dtype, torch.float32))
        even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
        return torch.cat((kept, pairs.flatten(-2).to(x.dtype)), dim=-1)

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per token of every pair: [D/2], fp32. Worked out where used, as in Rope."""
        pairs = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device)
        period = self.theta ** (pairs / self.dim)
        return 1.0 / period if self.yarn is None else self.yarn(period, self.theta)
