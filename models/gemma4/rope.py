"""A rotary embedding that rotates only some pairs of channels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.models.rope import Rope


@dataclass(frozen=True)
class ProportionalRope(Rope):
    """Rotate the first pairs, a fraction `rotated` of them; the others have frequency 0.

    Frequencies are those of a head that rotates whole, so the pairs that rotate are the fast ones.
    """

    rotated: float = 1.0

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per token of every pair: [D/2], fp32."""
        num_rotated = int(self.rotated * self.head_dim // 2)
        is_rotated = torch.arange(self.head_dim // 2, device=device) < num_rotated
        return super()._frequencies(device) * is_rotated

    def _frequencies(self, device: torch.device) -> Tensor:
        return self.frequencies(device)
