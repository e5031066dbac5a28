"""Replaces the kernels of transformers' recurrent layers by mixers, by the kernels' names.

Each is called with its layer and the metadata of the batch in one keyword argument; during a survey
with its layer and the recorder, and then no token reads another.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dtcp.autocast import as_autocast_casts
from dtcp.recurrent.mixer import CausalConv1d, GatedDeltaRule, GatedLinearAttention

CONV, RULE, SHIFT = "dtcp_conv", "dtcp_rule", "dtcp_shift"
"""The mixers' names in their layer."""


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    attn_metadata: Any,
    **_: Any,
) -> Tensor:
    """As the kernel of that name, by the layer's mixer: hidden_states [B, C, L] -> [B, C, L]."""
    layer, metadata = attn_metadata
    x, weight = as_autocast_casts(hidden_states.transpose(1, 2), weight)
    out = layer.get_submodule(CONV)(x, weight, metadata, bias=bias)
    return _activated(out, None, activation)


def _surveyed_conv(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    dilation: int = 1,
    attn_metadata: Any,
    **_: Any,
) -> Tensor:
    layer, notes = attn_metadata
    spread = {"dilation": dilation} if dilation > 1 else {}
    notes.note_kernel(layer, CONV, CausalConv1d, {"width": weight.shape[1], **spread})
    return _activated(hidden_states.transpose(1, 2), bias, activation)


def previous_token(x: Tensor, *, attn_metadata: Any) -> Tensor:
    """What the token before has, of a layer that is written again: x [B, L, C] -> [B, L, C].

    Zeros for the first one of a document. A convolution with the taps 1 and 0.
    """
    layer, metadata = attn_metadata
    taps = torch.eye(1, 2, dtype=x.dtype, device=x.device).expand(x.shape[-1], 2)
    return layer.get_submodule(SHIFT)(x, taps, metadata)


def _surveyed_previous_token(x: Tensor, *, attn_metadata: Any) -> Tensor:
    layer, notes = attn_metadata
    notes.note_kernel(layer, SHIFT, CausalConv1d, {"width": 2})
    return x


def ids_before(ids: Tensor, count: int, none: int, *, attn_metadata: Any) -> Tensor:
    """Ids of the tokens before each one in its document, the next one first: [B, L] -> [B, L, n].

    Of a layer that is written again. A convolution with one tap a channel, in fp64, where every id
    is exact; `none` where there is no token.
    """
    layer, metadata = attn_metadata
    x = (ids - none).double()[..., None].expand(*ids.shape, count)
    taps = torch.eye(count, count + 1, dtype=x.dtype, device=x.device).flip(0)
    before: Tensor = layer.get_submodule(SHIFT)(x, taps, metadata)
    return before.long() + none


def _surveyed_ids_before(ids: Tensor, count: int, none: int, *, attn_metadata: Any) -> Tensor:
    layer, notes = attn_metadata
    notes.note_kernel(layer, SHIFT, CausalConv1d, {"width": count + 1})
    return ids[..., None].expand(*ids.shape, count)


def _activated(x: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """[B, L, C] -> [B, C, L], as a layer takes it."""
    from transformers.activations import ACT2FN

    x = x if bias is None else x + bias
    return (x if activation is None else ACT2FN[activation](x)).transpose(1, 2)


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    attn_metadata: Any,
    **_: Any,
) -> tuple[Tensor, None]:
    layer, metadata = attn_metadata
    qkv = as_autocast_casts(query, key, value)
    return layer.get_submodule(RULE)(*qkv, g, beta, metadata), None


def _surveyed_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    attn_metadata: Any,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    layer, notes = attn_metadata
    notes.note_kernel(layer, RULE, GatedDeltaRule, {"normalize": use_qk_l2norm_in_kernel})
    per_head = [x.flatten(2).mean(-1)[..., None, None] for x in (query, key, g, beta)]
    # A share of every operand, so that mixing on the way to any of them shows.
    # A decay may be fp32 in a model of bf16.
    return (value + sum(per_head, torch.zeros(()))).to(value.dtype), None


def _chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    attn_metadata: Any,
    **_: Any,
) -> Tensor:
    """Mamba-2's scan: [B, L, H, P], steps dt [B, L, H], A [H], B and C [B, L, G, N], D [H]."""
    layer, metadata = attn_metadata
    hidden_states, B, C = as_autocast_casts(hidden_states, B, C)
    value, decay = _discretized(hidden_states, dt, A, dt_bias, dt_softplus, dt_limit)
    out: Tensor = layer.get_submodule(RULE)(C, B, value, decay, metadata)
    return out if D is None else out + D[:, None] * hidden_states.to(out.dtype)


def _surveyed_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    attn_metadata: Any,
    **_: Any,
) -> Tensor:
    layer, notes = attn_metadata
    notes.note_kernel(layer, RULE, GatedLinearAttention, {"scale": 1.0})
    per_token = [x.flatten(2).mean(-1)[..., None, None] for x in (dt, B, C)]
    return (hidden_states + sum(per_token, torch.zeros(()))).to(hidden_states.dtype)


def _discretized(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    bias: Tensor | None,
    softplus: bool,
    limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Each token's value and the logarithm of what it keeps, by its step, in fp32 at least."""
    wide = torch.promote_types(dt.dtype, torch.float32)
    step = dt if bias is None else dt + bias.to(dt.dtype)
    step = (F.softplus(step) if softplus else step).clamp(*limit).to(wide)
    return x.to(wide) * step[..., None], A.to(wide) * step


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, attn_metadata: Any
) -> Tensor:
    """Of a layer that is written again: q, k, v [B, L, H, D], g [B, L, H] or [B, L, H, D]."""
    layer, metadata = attn_metadata
    return layer.get_submodule(RULE)(*as_autocast_casts(q, k, v), g, metadata)


def _surveyed_lightning(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, attn_metadata: Any
) -> Tensor:
    layer, notes = attn_metadata
    notes.note_kernel(layer, RULE, GatedLinearAttention, {"scale": 1.0})
    of_decay = g.flatten(2).mean(-1)[..., None, None].to(v.dtype)
    return v + q.mean(-1, keepdim=True) + k.mean(-1, keepdim=True) + of_decay


def selective_scan(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, *, attn_metadata: Any
) -> Tensor:
    """Mamba's scan, of a layer that is written again: each channel has a state of N numbers.

    To linear attention a channel is a head with values of width 1, and each of its N numbers keeps
    a share of its own.

    Args:
        x, step: [B, L, C].
        A: [C, N], negative.
        B, C: [B, L, G, N], each shared by C / G channels.
    Returns:
        [B, L, C].
    """
    layer, metadata = attn_metadata
    x, B, C = as_autocast_casts(x, B, C)
    wide = torch.promote_types(x.dtype, torch.float32)
    step, A = step.to(wide), A.to(wide)
    value, decay = (x.to(wide) * step)[..., None], step[..., None] * A
    out: Tensor = layer.get_submodule(RULE)(C, B, value, decay, metadata)
    return out[..., 0]


def _surveyed_selective_scan(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, *, attn_metadata: Any
) -> Tensor:
    layer, notes = attn_metadata
    notes.note_kernel(layer, RULE, GatedLinearAttention, {"scale": 1.0})
    return x + step + sum((each.flatten(2).mean(-1)[..., None] for each in (B, C)), torch.zeros(()))


def _not_fused(*_: Any, **__: Any) -> None:
    """Makes a layer see no fused kernel, as without mamba_ssm."""


class Kernel(NamedTuple):
    """What replaces a kernel."""

    by_mixer: Callable[..., Any]
    surveyed: Callable[..., Any]
    """The same during a survey."""


_NOT_FUSED, _DELTA_RULE = Kernel(_not_fused, _not_fused), Kernel(_delta_rule, _surveyed_delta_rule)

KERNELS: Mapping[str, Kernel] = {
    "causal_conv1d_fn": Kernel(causal_conv1d_fn, _surveyed_conv),
    "previous_token": Kernel(previous_token, _surveyed_previous_token),
    "ids_before": Kernel(ids_before, _surveyed_ids_before),
    "torch_chunk_gated_delta_rule": _DELTA_RULE,
    "chunk_kimi_delta_attention": _DELTA_RULE,
    "mamba2_chunk_scan": Kernel(_chunk_scan, _surveyed_chunk_scan),
    "lightning_attention": Kernel(lightning_attention, _surveyed_lightning),
    "selective_scan": Kernel(selective_scan, _surveyed_selective_scan),
    "mamba_inner_fn": _NOT_FUSED,
    "mamba2_split_conv1d_scan_combined": _NOT_FUSED,
}
"""By the names of functions in transformers' modeling files."""
