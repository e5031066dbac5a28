"""Rotary positions of which only some pairs of channels turn."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.models.rope import Rope


@dataclass(frozen=True)
class ProportionalRope(Rope):
    """Turn the first `rotated` share of the pairs; the others stand still, at frequency 0.

    Frequencies are those of a head that turns whole, so more channels carry no position, and
    the ones that do are the fast ones.
    """

    rotated: float = 1.0

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per token of every pair: [D/2], fp32."""
        turning = int(self.rotated * self.head_dim // 2)
        every = super()._frequencies(device)
        return every * (torch.arange(self.head_dim // 2, device=device) < turning)

    def _frequencies(self, device: torch.device) -> Tensor:
        return self.frequencies(device)
