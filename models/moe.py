"""Experts: every token goes through the few that its router chose, and none is dropped.

Routers differ between families and are defined there; they return the chosen experts of each
token and the weight of each (`top_experts`, where a softmax over all chooses).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dtcp.experts.exchange import Meanwhile, RoutedTokens
from dtcp.experts.losses import RouterLoss
from dtcp.kernels.grouped_linear import grouped_linear
from dtcp.metadata import BatchMetadata
from dtcp.models.blocks import Activation


def check_top_k(config: str, field: str, top_k: int, num_experts: int) -> None:
    """Refuse a config that routes a token to no expert, or to more than there are.

    Args:
        config, field: the names of the config and of its field, for the error.
    Raises:
        ValueError: a number that is not 1 to num_experts.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"{config} routes each token to some of the experts, got {field}={top_k} of "
            f"num_experts={num_experts}: choose 1 to num_experts."
        )


def top_experts(
    logits: Tensor, top_k: int, router_loss: RouterLoss, real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Experts [N, k] int64 of the largest logits [N, E], and weights of these that sum to one.

    Args:
        real: [N] bool, False for padding.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probabilities = logits.softmax(-1)
    weight, index = probabilities.topk(top_k, dim=-1)
    weight = weight / weight.sum(-1, keepdim=True)
    chosen = {"logits": logits, "probabilities": probabilities, "index": index, "real": real}
    return index, router_loss(weight, **chosen)


class Experts(nn.Module):
    """E feed-forward parts, down(activation(gate(x), up(x))), of which each token goes through k.

    Args:
        activation: (gate, up) -> hidden channels, all [M, F].
    """

    load: Tensor
    """[E], the tokens that chose each expert since somebody has set it to zero, in training."""

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, activation: Activation) -> None:
        super().__init__()
        self.activation, self.num_experts = activation, num_experts
        self.gate = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.up = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.register_buffer("load", torch.zeros(num_experts), persistent=False)
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        index: Tensor,
        weight: Tensor,
        real: Tensor | None = None,
        beside: Meanwhile | None = None,
    ) -> Tensor:
        """Sum the weighted outputs of each token's experts.

        Args:
            x: [N, D].
            index: [N, k] int64, the experts of each token.
            weight: [N, k], of each expert's output.
            real: [N] bool, False for padding, which gives zeros and is counted nowhere.
            beside: gives [N, D] that is added, as of an expert that all tokens share: computed
                while tokens travel, where experts are on other ranks.
        Returns:
            [N, D].
        """
        mixed, other = self.mix(RoutedTokens(x, index, weight, beside), real)
        if self.training:
            # A recomputed forward counts twice, for all experts alike: who reads the loads
            # compares them with their mean.
            add_load(self.load, index, real)
        return mixed if other is None else mixed + other

    def mix(self, tokens: RoutedTokens, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What `forward` adds, apart, without counting: all experts on one device."""
        x, index, weight, beside = tokens
        chosen = index.flatten()
        order = chosen.argsort(stable=True)
        experts = torch.arange(self.num_experts, device=chosen.device)
        ends = torch.searchsorted(chosen[order], experts, right=True).to(torch.int32)
        out = self.compute(x[order // index.shape[1]], ends)
        out = out[order.argsort()].unflatten(0, index.shape)
        mixed = (out * weight[..., None].to(out.dtype)).sum(1)
        if real is not None:
            mixed = mixed.masked_fill(~real[:, None], 0)
        return mixed, None if beside is None else beside()

    def compute(self, rows: Tensor, ends: Tensor) -> Tensor:
        """The experts' outputs for rows [M, D] that are sorted by expert: [M, D]."""
        # Under autocast, tokens have a narrower dtype than weights.
        gate, up, down = (w.to(rows.dtype) for w in self.weights())
        hidden = self.activation(grouped_linear(rows, gate, ends), grouped_linear(rows, up, ends))
        return grouped_linear(hidden, down, ends)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """gate and up [E, F, D], down [E, D, F], as the products take them."""
        return self.gate, self.up, self.down

    def reset_parameters(self, std: float = 0.02) -> None:
        for weight in self.parameters():
            nn.init.normal_(weight, std=std)
        self.load.zero_()

    def extra_repr(self) -> str:
        num_experts, hidden_dim, dim = self.gate.shape
        return f"dim={dim}, hidden_dim={hidden_dim}, num_experts={num_experts}"


@torch.no_grad()
def add_load(load: Tensor, index: Tensor, real: Tensor | None) -> None:
    """Count the tokens that chose each expert, in place.

    Args:
        load: [E].
        index: [N, k] int64.
        real: [N] bool, False for padding, which is not counted.
    """
    ones = load.new_ones(index.shape) if real is None else real[:, None].expand_as(index)
    load.index_add_(0, index.flatten(), ones.to(load.dtype).flatten())


def real_tokens(attn_metadata: BatchMetadata | Mapping) -> Tensor | None:
    """Which tokens of a batch are no padding, in one line: [N] bool; None where it does not say."""
    if isinstance(attn_metadata, BatchMetadata) and attn_metadata.real is not None:
        return attn_metadata.real.flatten()
    return None
