"""Hyper-connections: several residual streams, mixed anew around every part of a block.

From Xie et al. 2025, "mHC: Manifold-Constrained Hyper-Connections",
https://arxiv.org/abs/2512.24880. Weights are worked out in fp32 and per token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HyperConnection(nn.Module):
    """How the streams enter a part of a block, and how its output goes back to them.

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
        """Collapse the streams [B, L, N, D] to the part's input.

        Returns:
            [B, L, D]; the share of each stream in the part's output [B, L, N]; and how the
            streams are mixed [B, L, N, N], from the first N to the second.
        """
        n = self.streams
        sizes = [n, n, n * n]
        parts = _project(x, self.fn, self.norm_eps).split(sizes, dim=-1)
        biases, scales = self.base.split(sizes), self.scale.unbind(0)
        enter, leave, mix = (
            part * scale + bias for part, scale, bias in zip(parts, scales, biases, strict=True)
        )
        enter = enter.sigmoid() + self.eps
        mix = self._doubly_stochastic(mix.unflatten(-1, (n, n)))
        collapsed = (enter[..., None] * x).sum(2).to(x.dtype)
        return collapsed, (2 * leave.sigmoid()).to(x.dtype), mix.to(x.dtype)

    def _doubly_stochastic(self, scores: Tensor) -> Tensor:
        """Rows and columns that sum to one: normalize either in turn, columns last."""
        mix = scores.softmax(-1) + self.eps
        mix = mix / (mix.sum(-2, keepdim=True) + self.eps)
        for _ in range(self.steps - 1):
            mix = mix / (mix.sum(-1, keepdim=True) + self.eps)
            mix = mix / (mix.sum(-2, keepdim=True) + self.eps)
        return mix

    def reset_parameters(self, std: float = 0.02) -> None:
        _reset(self, std)


class HyperHead(nn.Module):
    """The streams back to one, at the end of the decoder."""

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


def expand(out: Tensor, x: Tensor, leave: Tensor, mix: Tensor) -> Tensor:
    """A part's output [B, L, D] to the streams, beside the mixed streams x: [B, L, N, D]."""
    return leave[..., None] * out[..., None, :] + mix.mT @ x


def _project(x: Tensor, fn: Tensor, eps: float) -> Tensor:
    """The normalized streams of each token, all together, through fn; fp32 at least."""
    flat = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
    return F.linear(F.rms_norm(flat, flat.shape[-1:], eps=eps), fn.to(flat.dtype))


def _reset(module: nn.Module, std: float) -> None:
    # By name: a plan may hand forward other tensors than the parameters themselves.
    parameters = dict(module.named_parameters(recurse=False))
    nn.init.normal_(parameters["fn"], std=std)
    nn.init.zeros_(parameters["base"])
    nn.init.ones_(parameters["scale"])
