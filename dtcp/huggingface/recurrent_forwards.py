"""Recurrent layers of transformers without a kernel to replace, or whose kernel gets no metadata.

Their forward is rewritten, by the name of the class; tests compare it with the original.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dtcp.huggingface.ngram_layers import NGRAM_LAYERS
from dtcp.huggingface.recurrent_kernels import (
    causal_conv1d_fn,
    lightning_attention,
    previous_token,
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


def _griffin(
    self: Any, input_states: Tensor, position_ids: Tensor, *, attn_metadata: Any, **_: Any
) -> tuple[Tensor, None]:
    """RecurrentGemmaRecurrentBlock, which loops over tokens: a state of a number per channel."""
    gate, x = self.act_fn(self.linear_y(input_states)), self.linear_x(input_states)
    weight, bias = self.conv_1d.weight.squeeze(1), self.conv_1d.bias
    x = causal_conv1d_fn(x.transpose(1, 2), weight, bias, attn_metadata=attn_metadata)
    value, decay = _gated_by_rg_lru(self.rg_lru, x.transpose(1, 2), position_ids)
    # To linear attention a channel is a head with a key of 1, and a value and a decay of width 1.
    one, value, decay = torch.ones_like(value[:, :, :1, None]), value[..., None], decay[..., None]
    out = lightning_attention(one, one, value, decay, attn_metadata=attn_metadata)
    return self.linear_out(out[..., 0] * gate), None


def _gated_by_rg_lru(unit: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the RG-LRU adds to its state, and the log of what it keeps: x [B, L, C] -> [B, L, C]."""
    heads = x.unflatten(-1, (unit.num_attention_heads, unit.block_width))

    def gate(weight: Tensor, bias: Tensor) -> Tensor:
        return (torch.einsum("blhi,hij->blhj", heads, weight) + bias).flatten(2).sigmoid()

    kept = gate(unit.recurrent_gate_weight, unit.recurrent_gate_bias).to(_wide(x))
    decay = -8.0 * kept * F.softplus(unit.recurrent_param.to(_wide(x)))
    added = _sqrt_of_bound_slope(1 - (2 * decay).exp())
    added = added.where(position_ids[..., None] != 0, 1.0).to(x.dtype)
    return x * gate(unit.input_gate_weight, unit.input_gate_bias) * added, decay


def _sqrt_of_bound_slope(x: Tensor) -> Tensor:
    """The square root, with its slope bounded by MOST_SLOPE."""
    slope = 0.5 / x.detach().clamp(min=0.25 / MOST_SLOPE**2).sqrt()
    return x.detach().sqrt() + slope * (x - x.detach())


def _zaya(
    self: Any, hidden_states: Tensor, *_: Any, attn_metadata: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """ZayaCCAProjection: queries and keys of the last tokens, half of the values of the one before.

    Its two convolutions see nothing left of a document, and the second one sees the first one's
    bias there.
    """
    q, k = self.q_proj(hidden_states), self.k_proj(hidden_states)
    first, second = self.conv_qk_depthwise, self.conv_qk_grouped
    both, weight = torch.cat((q, k), dim=-1).transpose(1, 2), first.weight.squeeze(1)
    tap = causal_conv1d_fn(both, weight, attn_metadata=attn_metadata).transpose(1, 2)
    taps = [tap]
    for _tap in range(self.grouped_kernel_size - 1):
        tap = previous_token(tap, attn_metadata=attn_metadata)
        taps.insert(0, tap)
    # [C, C / groups, w], and for each token its w last ones.
    last = torch.stack(taps, dim=-1) + first.bias[:, None]
    mixed = F.conv1d(last.flatten(0, 1), second.weight, second.bias, groups=second.groups)
    mixed = mixed.view(both.mT.shape)
    q, k = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k))
    q = (q + k.repeat_interleave(self.num_key_value_groups, dim=2)) / 2
    k = q.unflatten(2, (-1, self.num_key_value_groups)).mean(3)
    of_q, of_k = mixed.split((q.flatten(2).shape[-1], k.flatten(2).shape[-1]), dim=-1)
    delayed = self.v_proj_delayed(hidden_states)
    # Of no token, it is the projection's bias.
    none = self.v_proj_delayed(torch.zeros_like(hidden_states[:1, :1]))
    delayed = previous_token(delayed - none, attn_metadata=attn_metadata) + none
    v = torch.cat((self.v_proj_current(hidden_states), delayed), dim=-1)
    return of_q.view_as(q) + q, of_k.view_as(k) + k, v.unflatten(-1, (-1, self.head_dim))


def _inkling(self: Any, hidden_states: Tensor, *, attn_metadata: Any, **_: Any) -> Tensor:
    """InklingShortConvolution: a convolution beside its input, in fp32."""
    x, out = _beside_convolved(causal_conv1d_fn, self, hidden_states, attn_metadata)
    return (out + x).to(hidden_states.dtype)


def _inkling_2(self: Any, hidden_states: Tensor, *_: Any, attn_metadata: Any, **__: Any) -> Tensor:
    """Inkling2ShortConvolution: the same, of unit size where both are."""
    x, out = _beside_convolved(causal_conv1d_fn, self, hidden_states, attn_metadata)
    return ((out + x) / math.sqrt(self.conv_kernel_size + 1)).to(hidden_states.dtype)


def _beside_convolved(
    kernel: Callable[..., Tensor], self: Any, x: Tensor, attn_metadata: Any
) -> tuple[Tensor, Tensor]:
    x = x.to(_wide(x))
    weight, bias = self.conv1d.weight.squeeze(1).to(x.dtype), self.conv1d.bias
    return x, kernel(x.transpose(1, 2), weight, bias, attn_metadata=attn_metadata).transpose(1, 2)


def _inkling_2_dynamic(
    self: Any, hidden_states: Tensor, dynamic_input: Tensor, *_: Any, attn_metadata: Any, **__: Any
) -> Tensor:
    """Inkling2DynamicShortConvolution: taps of each channel, and of each token and head."""
    width, x = self.conv_kernel_size, hidden_states.to(_wide(hidden_states))
    of_token = self.weight_proj(dynamic_input).to(x.dtype).unflatten(-1, (-1, width))
    out, lagged = x, x
    for lag, of_channel in enumerate(self.static_weight.to(x.dtype)):
        if lag:
            lagged = previous_token(lagged, attn_metadata=attn_metadata)
        heads = of_channel.unflatten(0, (of_token.shape[2], -1)) + of_token[..., lag, None]
        out = out + lagged * heads.flatten(2)
    return (out / math.sqrt(2 * width + 1)).to(hidden_states.dtype)


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


MOST_SLOPE = 1000.0
"""Of the square root in the RG-LRU, as in transformers."""

WRITTEN_AGAIN: Mapping[str, Any] = {
    "MiniMaxLightningAttention": _minimax,
    "MambaMixer": _mamba,
    "FalconMambaMixer": _mamba,
    "JambaMambaMixer": _mamba,
    "ZambaMambaMixer": _zamba,
    "RecurrentGemmaRecurrentBlock": _griffin,
    "ZayaCCAProjection": _zaya,
    "InklingShortConvolution": _inkling,
    "Inkling2ShortConvolution": _inkling_2,
    "Inkling2DynamicShortConvolution": _inkling_2_dynamic,
    "Inkling2LoopShortConvolution": _inkling_2,
    "Inkling2LoopDynamicShortConvolution": _inkling_2_dynamic,
    **NGRAM_LAYERS,
}
"""By the name of the class."""
READ_BY_WEIGHT = ("dt_proj",)
"""Layers that are called here, where transformers (5.23) reads their weights: adapters differ."""
