"""Per-token modules that model families share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm for a weight that may have a wider dtype than its input.

    The product is computed in the wider of the two, and rounded to the dtype of x once.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        out = F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)
        return out.to(x.dtype)


class ParameterModule(nn.Module):
    """A parameter as a module of its own: so a plan can name it and place it on a mesh.

    Args:
        fill: the value of every element at the start.
    """

    def __init__(self, *shape: int, fill: float = 0.0) -> None:
        super().__init__()
        self.fill = fill
        self.weight = nn.Parameter(torch.full(shape, fill))

    def forward(self) -> Tensor:
        return self.weight

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.fill)


Activation = Callable[[Tensor, Tensor], Tensor]
"""(gate, up) -> the hidden channels of a feed-forward part."""


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, with gelu by tanh."""
    return F.gelu(gate, approximate="tanh") * up


class FeedForward(nn.Module):
    """down(activation(gate(x), up(x))). From Shazeer 2020, https://arxiv.org/abs/2002.05202."""

    def __init__(self, dim: int, hidden_dim: int, activation: Activation = swiglu) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x), self.up(x)))
