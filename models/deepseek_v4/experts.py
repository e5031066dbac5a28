"""Experts of DeepSeek-V4 and their routers."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtcp.experts.losses import RouterLoss
from dtcp.models.blocks import FeedForward
from dtcp.models.deepseek_v4.config import DeepseekV4Config
from dtcp.models.moe import Experts, add_load


class MoE(nn.Module):
    """The experts that a router chooses, and a shared one for all tokens.

    Args:
        by_token: look experts up by token id.
    """

    def __init__(self, config: DeepseekV4Config, *, by_token: bool) -> None:
        super().__init__()
        self.router = HashRouter(config) if by_token else TopKRouter(config)
        activation = ClampedSwiGLU(config.expert_limit)
        self.experts = Experts(config.dim, config.hidden_dim, config.num_experts, activation)
        shared = activation if config.clamp_shared else ClampedSwiGLU(float("inf"))
        self.shared = FeedForward(config.dim, config.hidden_dim, shared)

    def forward(self, x: Tensor, input_ids: Tensor, real: Tensor | None) -> Tensor:
        """Args: x [B, L, D]; input_ids [B, L]; real [B * L] bool, False for padding."""
        flat = x.flatten(0, 1)
        index, weight = self.router(flat, input_ids.flatten(), real)
        shared = partial(self.shared, flat)
        return self.experts(flat, index, weight, real, shared).view(x.shape)


class ClampedSwiGLU:
    """silu(gate) * up, with gate clamped from above and up clamped on both sides."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


class Router(nn.Module):
    """Scores experts: sqrt(softplus(weight @ x)), in fp32 at least."""

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__()
        self.per_token, self.scale = config.experts_per_token, config.route_scale
        self.router_loss = RouterLoss(balance=config.balance_weight, z=config.z_weight)
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.dim))
        self.reset_parameters()

    def forward(
        self, x: Tensor, input_ids: Tensor, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Choose experts for tokens x [N, D]: their indices and weights, [N, k] each.

        Args:
            real: [N] bool, False for padding, which counts for no load.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide))
        scores = F.softplus(logits).sqrt()
        index = self.choose(scores, input_ids, real)
        weight = scores.gather(1, index)
        weight = self.router_loss(
            weight / (weight.sum(1, keepdim=True) + 1e-20),
            logits=logits,
            probabilities=scores / (scores.sum(1, keepdim=True) + 1e-20),
            index=index,
            real=real,
        )
        return index, weight * self.scale

    def choose(self, scores: Tensor, input_ids: Tensor, real: Tensor | None) -> Tensor:
        """The experts of each token: [N, E] -> [N, k] int64."""
        raise NotImplementedError

    def reset_parameters(self, std: float = 0.02) -> None:
        for weight in self.parameters(recurse=False):
            nn.init.normal_(weight, std=std)


class TopKRouter(Router):
    """The experts with the highest scores; a bias keeps their loads even.

    The bias takes part in the choice only. It is not a parameter: `balance` moves it after a
    step, up for experts that had too few tokens.
    """

    bias: Tensor
    load: Tensor

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__(config)
        self.register_buffer("bias", torch.zeros(config.num_experts))
        self.register_buffer("load", torch.zeros(config.num_experts), persistent=False)

    def choose(self, scores: Tensor, input_ids: Tensor, real: Tensor | None) -> Tensor:
        with torch.no_grad():
            index = (scores + self.bias).topk(self.per_token, dim=1).indices
            if self.training:
                # A recomputed forward counts twice, for all experts alike: `balance` asks only
                # which loads are above the mean.
                add_load(self.load, index, real)
        return index

    @torch.no_grad()
    def balance(self, load: Tensor, speed: float) -> None:
        """Move the bias by `speed` against the load [E], summed over all ranks.

        From Wang et al. 2024, Auxiliary-Loss-Free Load Balancing,
        https://arxiv.org/abs/2408.15664.
        """
        self.bias += speed * (load.mean() - load).sign()
        self.load.zero_()

    def reset_parameters(self, std: float = 0.02) -> None:
        super().reset_parameters(std)
        for buffer in self.buffers(recurse=False):
            buffer.zero_()


class HashRouter(Router):
    """Experts looked up by token id, in a table that is never trained."""

    experts: Tensor

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__(config)
        # Nothing of what it chooses could be balanced.
        self.router_loss = RouterLoss(z=config.z_weight)
        shape = (config.vocab_size, config.experts_per_token)
        self.register_buffer("experts", torch.zeros(shape, dtype=torch.int64))
        self.reset_parameters()

    def choose(self, scores: Tensor, input_ids: Tensor, real: Tensor | None) -> Tensor:
        return self.experts[input_ids]

    def reset_parameters(self, std: float = 0.02) -> None:
        super().reset_parameters(std)
        for experts in self.buffers(recurse=False):
            token = torch.arange(experts.shape[0], device=experts.device)[:, None]
            choice = torch.arange(experts.shape[1], device=experts.device)
            experts.copy_((token * experts.shape[1] + choice) % self.weight.shape[0])
