"""Rotary embeddings, computed from the position of every token.

No table indexed by position is kept. A table would be one more tensor to shard the right way;
position_ids move with their tokens, whatever the layout.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.softmax.mixer import rotate


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow down the slow rotations of a model trained on short rows, keep the fast ones.

    Wavelengths above original_seq_len / low are multiplied by `factor`, those below
    original_seq_len / high are kept, and in between the two are interpolated.
    From Llama 3.1, https://arxiv.org/abs/2407.21783.
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original_seq_len: int = 8192

    def __call__(self, frequency: Tensor) -> Tensor:
        wavelength = 2 * math.pi / frequency
        kept = (self.original_seq_len / wavelength - self.low) / (self.high - self.low)
        kept = kept.clamp(0, 1)
        return (1 - kept) * frequency / self.factor + kept * frequency


@dataclass(frozen=True)
class Rope:
    """Rotate each pair (d, d + D/2) of a head by an angle that grows with the position."""

    head_dim: int
    theta: float = 10_000.0
    scaling: Llama3Scaling | None = None

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(
                f"Rope rotates pairs of channels, got head_dim={self.head_dim}: make it even."
            )

    def __call__(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """Rotate x [B, L, H, D] by position_ids [B, L]; the dtype of x stays."""
        return rotate(x, position_ids, self._frequencies(x.device))

    def _frequencies(self, device: torch.device) -> Tensor:
        """Radians per token of every pair: [D/2], fp32.

        Computed where it is used, so there is no buffer to fill after a build on the meta device,
        to shard, or to be cast to the parameters' dtype with the rest of the model.
        """
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        frequency = 1.0 / self.theta ** (pairs / self.head_dim)
        return frequency if self.scaling is None else self.scaling(frequency)
