"""Experts: every token goes through the few that its router chose, and none is dropped.

Routers differ between families and are defined there; they return the chosen experts of each
token and the weight of each.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dtcp.kernels.grouped_linear import grouped_linear

Activation = Callable[[Tensor, Tensor], Tensor]
"""(gate, up) -> the hidden channels of a feed-forward part."""


class Experts(nn.Module):
    """E feed-forward parts, down(activation(gate(x), up(x))), of which each token goes through k.

    Args:
        activation: (gate, up) -> hidden channels, all [M, F].
    """

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.up = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.reset_parameters()

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Sum the weighted outputs of each token's experts.

        Args:
            x: [N, D].
            index: [N, k] int64, the experts of each token.
            weight: [N, k], of each expert's output.
        Returns:
            [N, D].
        """
        # Under autocast, tokens have a narrower dtype than weights.
        gate, up, down = (w.to(x.dtype) for w in self.weights())
        chosen = index.flatten()
        order = chosen.argsort(stable=True)
        experts = torch.arange(len(gate), device=chosen.device)
        ends = torch.searchsorted(chosen[order], experts, right=True).to(torch.int32)
        rows = x[order // index.shape[1]]  # [N*k, D]
        hidden = self.activation(grouped_linear(rows, gate, ends), grouped_linear(rows, up, ends))
        out = grouped_linear(hidden, down, ends)[order.argsort()].unflatten(0, index.shape)
        return (out * weight[..., None].to(out.dtype)).sum(1)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """gate and up [E, F, D], down [E, D, F], as the products take them."""
        return self.gate, self.up, self.down

    def reset_parameters(self, std: float = 0.02) -> None:
        for weight in self.parameters():
            nn.init.normal_(weight, std=std)

    def extra_repr(self) -> str:
        num_experts, hidden_dim, dim = self.gate.shape
        return f"dim={dim}, hidden_dim={hidden_dim}, num_experts={num_experts}"
