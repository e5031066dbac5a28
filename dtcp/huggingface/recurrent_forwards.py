"""Recurrent layers of transformers that have no kernel to name, or hand theirs no batch.

Their forward is written again, by the name of the class, and held against the one that it stands
for.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dtcp.huggingface.recurrent_kernels import (
    causal_conv1d_fn,
    lightning_attention,
    selective_scan,
)


def _minimax(self: Any, hidden_states: Tensor, *, attn_metadata: Any, **_: Any) -> Any:
    """MiniMaxLightningAttention, which loops over blocks of the row; its decay is a constant."""
    qkv = self.act_fn(self.qkv_proj(hidden_states)).unflatten(-1, (-1, 3 * self.head_dim))
    q, k, v = qkv.split(self.head_dim, dim=-1)
    decay = -self.slope_rate.flatten().to(torch.promote_types(q.dtype, torch.float32))
    out = lightning_attention(q, k, v, decay.expand(q.shape[:3]), attn_metadata=attn_metadata)
    gated = self.output_gate(hidden_states).sigmoid() * self.norm(out.flatten(2))
    return self.out_proj(gated), None


def _mamba(self: Any, hidden_states: Tensor, *, attn_metadata: Any, **_: Any) -> Tensor:
    """MambaMixer and its kin: Falcon Mamba and Jamba normalize what a step is made of."""
    x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
    x = _convolved(causal_conv1d_fn, self, x, attn_metadata)
    widths = (self.time_step_rank, self.ssm_state_size, self.ssm_state_size)
    step, B, C = self.x_proj(x).split(widths, dim=-1)
    if hasattr(self, "dt_layernorm"):
        step, B, C = self.dt_layernorm(step), self.b_layernorm(B), self.c_layernorm(C)
    step = F.softplus(self.dt_proj(step))
    A = -self.A_log.to(_wide(x)).exp()
    out = selective_scan(x, step, A, B[:, :, None], C[:, :, None], attn_metadata=attn_metadata)
    out = (out + self.D.to(_wide(x)) * x) * F.silu(gate)
    return self.out_proj(out.to(hidden_states.dtype))


def _zamba(self: Any, hidden_states: Tensor, *, attn_metadata: Any, **_: Any) -> Tensor:
    """ZambaMambaMixer: Mamba with a step, B and C for each group of channels."""
    heads = self.n_mamba_heads
    x, gate = self.in_proj(hidden_states).unflatten(-1, (-1, 2)).unbind(-1)
    x = _convolved(causal_conv1d_fn, self, x, attn_metadata)
    widths = (self.time_step_rank, self.ssm_state_size, self.ssm_state_size)
    by_head = torch.einsum("blhp,hrp->blhr", x.unflatten(-1, (heads, -1)), self.x_proj_weight)
    step, B, C = by_head.split(widths, dim=-1)
    step = torch.einsum("blhr,hpr->blhp", step, self.dt_proj_weight) + self.dt_proj_bias
    A = -self.A_log.to(_wide(x)).exp().flatten(0, 1)
    step = F.softplus(step).flatten(2)
    out = selective_scan(x, step, A, B, C, attn_metadata=attn_metadata)
    out = (out + self.D.to(_wide(x)).flatten() * x) * F.silu(gate)
    return self.out_proj(out.to(hidden_states.dtype))


def _convolved(kernel: Callable[..., Tensor], self: Any, x: Tensor, attn_metadata: Any) -> Tensor:
    """[B, L, C], each channel with its last tokens; the kernel is what its caller finds by name."""
    out = kernel(
        x.transpose(1, 2),
        self.conv1d.weight.squeeze(1),
        self.conv1d.bias,
        activation=self.activation,
        attn_metadata=attn_metadata,
    )
    return out.transpose(1, 2)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


WRITTEN_AGAIN: Mapping[str, Any] = {
    "MiniMaxLightningAttention": _minimax,
    "MambaMixer": _mamba,
    "FalconMambaMixer": _mamba,
    "JambaMambaMixer": _mamba,
    "ZambaMambaMixer": _zamba,
}
"""By the name of the class."""
READ_BY_WEIGHT = ("dt_proj",)
"""Layers that are called here, where transformers (5.23) reads their weights: adapters differ."""
