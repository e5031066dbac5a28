"""Recurrent layers of transformers: their kernels are called by name, and the names are given anew.

A layer of transformers (5.23) calls its convolution and its state's rule as functions of its
module, `causal_conv1d_fn` and `torch_chunk_gated_delta_rule` for example, and hands them the
keyword arguments of its own call. Here the layer's forward, as it stands, is run with functions in
the place of these that call mixers. Nothing of transformers is patched: the forward belongs to the
one module, and its names are a copy.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtcp.forward import INSIDE, wrap_forward
from dtcp.huggingface.autocast import as_autocast_casts
from dtcp.metadata import BatchMetadata
from dtcp.mixer import Mixer
from dtcp.recurrent.mixer import CausalConv1d, GatedDeltaRule, GatedLinearAttention

CONV, RULE = "dtcp_conv", "dtcp_rule"
"""The mixers' names in their layer."""


@dataclass(frozen=True)
class SurveyedMixer:
    """One mixer of a recurrent layer, and what it has to be.

    Args:
        name: of the mixer in its model.
        kind: its class.
        arguments: of its constructor, by keyword.
    """

    name: str
    kind: type[Mixer]
    arguments: tuple[tuple[str, Any], ...]

    def mixer(self) -> Mixer:
        return self.kind(**dict(self.arguments))


class KernelNotes(Protocol):
    """Who notes what layers call while they are surveyed."""

    def note_unread(self) -> None:
        """A layer receives no metadata."""
        ...

    def note_kernel(
        self, layer: nn.Module, name: str, kind: type[Mixer], arguments: Mapping[str, Any]
    ) -> None:
        """A layer calls a kernel that this mixer stands for."""
        ...


def recurrent_layers(model: nn.Module) -> list[nn.Module]:
    """Modules whose forward calls kernels that mixers stand for, by the names of functions."""
    return [
        m
        for m in model.modules()
        if type(m).__name__ in WRITTEN_AGAIN or kernel_names(m) & KERNELS.keys()
    ]


def kernel_names(module: nn.Module) -> set[str]:
    """Global names that the forward of a module's class reads."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set() if code is None else set(code.co_names)


def install_recurrent_mixers(model: nn.Module, surveyed: tuple[SurveyedMixer, ...]) -> None:
    """Give recurrent layers their mixers, and let their own forward call them."""
    # One function for all layers of a class, so that they share their graphs.
    forwards: dict[type, FunctionType] = {}
    for each in surveyed:
        name, _, attribute = each.name.rpartition(".")
        layer = model.get_submodule(name)
        if INSIDE not in vars(layer):
            if type(layer) not in forwards:
                forwards[type(layer)] = with_kernels(layer, _on_mixer)
            layer.forward = MethodType(forwards[type(layer)], layer)
            wrap_forward(layer, _on_batch)
        layer.add_module(attribute, each.mixer())


@contextmanager
def noting_kernels(model: nn.Module, notes: KernelNotes) -> Iterator[None]:
    """Inside, recurrent layers say which kernels they call, and no token reads another in them."""
    layers = [m for m in recurrent_layers(model) if "forward" not in vars(m)]
    for layer in layers:
        surveyed = with_kernels(layer, _while_surveyed)
        layer.forward = MethodType(_surveyed(surveyed, notes), layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _surveyed(forward: Callable[..., Any], notes: KernelNotes) -> Callable[..., Any]:
    def run(layer: nn.Module, *args: Any, attn_metadata: Any = None, **kwargs: Any) -> Any:
        if attn_metadata is None:
            notes.note_unread()
        return forward(layer, *args, **kwargs, attn_metadata=(layer, notes))

    return run


def _on_batch(
    layer: nn.Module,
    forward: Callable[..., Any],
    *args: Any,
    attn_metadata: BatchMetadata | None = None,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    """A layer's forward, in which each kernel finds its mixer and its batch."""
    if attn_metadata is None and isinstance(attention_mask, BatchMetadata):
        # A layer above hands on no more than a mask.
        attn_metadata, attention_mask = attention_mask, None
    if attn_metadata is None or attention_mask is not None:
        raise ValueError(
            f"{type(layer).__name__} reads the metadata of its batch alone, got attn_metadata of "
            f"type {type(attn_metadata).__name__}, attention_mask of type "
            f"{type(attention_mask).__name__}: pass attn_metadata=sharded.attn_metadata of "
            f"shard_hf_batch, and no mask."
        )
    return forward(*args, **kwargs, attn_metadata=(layer, attn_metadata))


def with_kernels(layer: nn.Module, kernel: Callable[[str, Any], Callable[..., Any]]) -> Any:
    """The forward of a recurrent layer's class, with other functions for its kernels.

    Args:
        kernel: of the name of a kernel and the layer's own, the function to call instead.
    """
    forward = WRITTEN_AGAIN.get(type(layer).__name__) or inspect.unwrap(type(layer).forward)
    names = forward.__globals__
    # Without __name__, for dynamo (2.13) would look names up in the module of that name.
    own = {key: x for key, x in names.items() if key != "__name__"}
    own |= {name: kernel(name, names[name]) for name in KERNELS if name in names}
    made = FunctionType(
        forward.__code__, own, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _on_mixer(name: str, _: Any) -> Callable[..., Any]:
    return KERNELS[name]


def _while_surveyed(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    """Note the call; where a layer hands its kernel no batch, the survey finds what it mixes."""

    def run(*args: Any, attn_metadata: Any = None, **kwargs: Any) -> Any:
        if attn_metadata is None:
            return own(*args, **kwargs)
        return SURVEYED_KERNELS[name](*args, attn_metadata=attn_metadata, **kwargs)

    return run


def _conv(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    attn_metadata: Any,
    **_: Any,
) -> Tensor:
    layer, metadata = attn_metadata
    x, weight = as_autocast_casts(hidden_states.transpose(1, 2), weight)
    out = layer.get_submodule(CONV)(x, weight, metadata)
    return _activated(out, bias, activation)


def _surveyed_conv(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    attn_metadata: Any,
    **_: Any,
) -> Tensor:
    layer, notes = attn_metadata
    notes.note_kernel(layer, CONV, CausalConv1d, {"width": weight.shape[1]})
    return _activated(hidden_states.transpose(1, 2), bias, activation)


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
    # Of every operand something, so that mixing on the way to any is seen.
    return value + sum(per_head, torch.zeros(())), None


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
    return out if D is None else out + D[:, None] * hidden_states


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
    return hidden_states + sum(per_token, torch.zeros(()))


def _discretized(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    bias: Tensor | None,
    softplus: bool,
    limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Each token's value and the logarithm of what it keeps, by its step."""
    wide = torch.promote_types(dt.dtype, torch.float32)
    step = dt if bias is None else dt + bias.to(dt.dtype)
    step = (F.softplus(step) if softplus else step).clamp(*limit).to(wide)
    return (x.to(wide) * step[..., None]).to(x.dtype), A.to(wide) * step


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, attn_metadata: Any
) -> Tensor:
    """Of a layer that is written again: q, k, v [B, L, H, D], g [B, L, H]."""
    layer, metadata = attn_metadata
    out: Tensor = layer.get_submodule(RULE)(*as_autocast_casts(q, k, v), g, metadata)
    return out


def _surveyed_lightning(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, attn_metadata: Any
) -> Tensor:
    layer, notes = attn_metadata
    notes.note_kernel(layer, RULE, GatedLinearAttention, {"scale": 1.0})
    return v + q.mean(-1, keepdim=True) + k.mean(-1, keepdim=True)


def _minimax(self: Any, hidden_states: Tensor, *, attn_metadata: Any, **_: Any) -> Any:
    """MiniMaxLightningAttention, which loops over blocks of the row; its decay is a constant."""
    qkv = self.act_fn(self.qkv_proj(hidden_states)).unflatten(-1, (-1, 3 * self.head_dim))
    q, k, v = qkv.split(self.head_dim, dim=-1)
    decay = -self.slope_rate.flatten().to(torch.promote_types(q.dtype, torch.float32))
    out = lightning_attention(q, k, v, decay.expand(q.shape[:3]), attn_metadata=attn_metadata)
    gated = self.output_gate(hidden_states).sigmoid() * self.norm(out.flatten(2))
    return self.out_proj(gated), None


WRITTEN_AGAIN: Mapping[str, Any] = {"MiniMaxLightningAttention": _minimax}
"""Layers without a kernel to name, by the name of the class."""


def _not_fused(*_: Any, **__: Any) -> None:
    """What says that a layer's fused kernel is not there, as it does without mamba_ssm."""


KERNELS: Mapping[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _conv,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _chunk_scan,
    "lightning_attention": lightning_attention,
    "mamba2_split_conv1d_scan_combined": _not_fused,
}
"""Functions of transformers' modeling files, and what stands for them."""

SURVEYED_KERNELS: Mapping[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _surveyed_conv,
    "torch_chunk_gated_delta_rule": _surveyed_delta_rule,
    "chunk_kimi_delta_attention": _surveyed_delta_rule,
    "mamba2_chunk_scan": _surveyed_chunk_scan,
    "lightning_attention": _surveyed_lightning,
    "mamba2_split_conv1d_scan_combined": _not_fused,
}
"""The same while a model is surveyed."""
