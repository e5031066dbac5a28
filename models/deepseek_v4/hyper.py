"""Hyper-connections: several residual streams, mixed before attention and before the experts.

From Xie et al. 2025, "mHC: Manifold-Constrained Hyper-Connections",
https://arxiv.org/abs/2512.24880. Mixing weights are computed in fp32, per token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HyperConnection(nn.Module):
    """How the streams enter a module of a block, and how its output goes back to them.

    Args:
        streams: N.
        steps: of Sinkhorn's iteration, which makes the mixing matrix doubly stochastic.
    """

    def __init__(self, dim: int, streams: int, *, steps: int, eps: float, norm_eps: float) -> None:
        super().__init__()
        self.streams, self.steps, self.eps, self.norm_eps = streams, steps, eps, norm_eps
        rows = streams * (2 + streams)
        self.fn = nn.Parameter(torch.empty(rows, streams * dim))
        self.base = nn.Parameter(torch.empty(rows))
        self.scale = nn.Parameter(torch.empty(3))
        self.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Collapse the streams [B, L, N, D] to the module's input.

        Returns:
            [B, L, D]; the weight of the module's output in each stream [B, L, N]; and the mixing
            matrix of the streams [B, L, N, N], from the first N to the second.
        """
        n = self.streams
        sizes = [n, n, n * n]
        parts = _project(x, self.fn, self.norm_eps).split(sizes, dim=-1)
        biases, scales = self.base.split(sizes), self.scale.unbind(0)
        pre, post, mix = (
            part * scale + bias for part, scale, bias in zip(parts, scales, biases, strict=True)
        )
        pre = pre.sigmoid() + self.eps
        mix = self._doubly_stochastic(mix.unflatten(-1, (n, n)))
        collapsed = (pre[..., None] * x).sum(2).to(x.dtype)
        return collapsed, (2 * post.sigmoid()).to(x.dtype), mix.to(x.dtype)

    def _doubly_stochastic(self, scores: Tensor) -> Tensor:
        """Make rows and columns sum to one: normalize them in turn, columns last."""
        mix = scores.softmax(-1) + self.eps
        mix = mix / (mix.sum(-2, keepdim=True) + self.eps)
        for _ in range(self.steps - 1):
            mix = mix / (mix.sum(-1, keepdim=True) + self.eps)
            mix = mix / (mix.sum(-2, keepdim=True) + self.eps)
        return mix

    def reset_parameters(self, std: float = 0.02) -> None:
        _reset(self, std)


class HyperHead(nn.Module):
    """Collapses the streams to one at the end of the decoder."""

    def __init__(self, dim: int, streams: int, *, eps: float, norm_eps: float) -> None:
        super().__init__()
        self.eps, self.norm_eps = eps, norm_eps
        self.fn = nn.Parameter(torch.empty(streams, streams * dim))
        self.base = nn.Parameter(torch.empty(streams))
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, N, D] -> [B, L, D]."""
        weight = (_project(x, self.fn, self.norm_eps) * self.scale + self.base).sigmoid()
        return ((weight + self.eps)[..., None] * x).sum(2).to(x.dtype)

    def reset_parameters(self, std: float = 0.02) -> None:
        _reset(self, std)


def expand(out: Tensor, x: Tensor, post: Tensor, mix: Tensor) -> Tensor:
    """Add a module's output [B, L, D] to the mixed streams x: [B, L, N, D]."""
    return post[..., None] * out[..., None, :] + mix.mT @ x


def _project(x: Tensor, fn: Tensor, eps: float) -> Tensor:
    """Project the streams of each token, normalized together, by fn; fp32 at least."""
    flat = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
    return F.linear(F.rms_norm(flat, flat.shape[-1:], eps=eps), fn.to(flat.dtype))


def _reset(module: nn.Module, std: float) -> None:
    # By name: a plan may give forward other tensors than the parameters.
    parameters = dict(module.named_parameters(recurse=False))
    nn.init.normal_(parameters["fn"], std=std)
    nn.init.zeros_(parameters["base"])
    nn.init.ones_(parameters["scale"])
