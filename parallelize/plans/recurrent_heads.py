"""Recurrent layers of transformers by heads: which of their layers are split over tp, and how.

A layer is known by what it is made of. Heads, or channels where each is one, are split with all
that makes them; where several share keys (B and C of Mamba-2), each rank has those that its heads
read. A layer of another form, or with heads that tp does not divide, is left out.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel

from dtcp.huggingface.recurrent_layers import recurrent_layers
from dtcp.parallelize.plans.adapters import adapted
from dtcp.parallelize.plans.forward_code import has_parameters
from dtcp.parallelize.tensor_parallel import (
    WHOLE_FOR_HEADS,
    GroupNormOfParts,
    HeadsOfLayer,
    LocalParams,
    Segment,
    SegmentRows,
    SumForHeads,
    gated_norm,
)

Styles = dict[str, ParallelStyle]
ROWS = LocalParams(Shard(0))
"""Of a layer whose outputs are heads, one after the other."""


def recurrent_heads(model: nn.Module, modules: Mapping[str, nn.Module], tp: int) -> Styles:
    """Styles of recurrent layers and of the modules in them, by name."""
    layers = {id(layer) for layer in recurrent_layers(model)}
    styles: Styles = {}
    for name, module in modules.items():
        if id(module) in layers:
            of_layer = _styles(module, tp)
            own = {f"{name}.{part}" if part else name: style for part, style in of_layer.items()}
            own = {part: style for part, style in own.items() if part in modules}
            styles |= own if _covers(own, name, module) else {}
    return styles


def _styles(layer: Any, tp: int) -> Styles:
    for form in FORMS:
        try:
            styles = form(layer, tp)
        except AttributeError:
            continue  # It lacks what layers of this form have.
        if styles:
            return styles
    return {}


def _covers(styles: Styles, name: str, layer: nn.Module) -> bool:
    """Whether there is a style for each parameter of a layer."""
    owners = [n for n, m in layer.named_modules() if has_parameters(m)]
    return all(adapted(f"{name}.{owner}" if owner else name)[0] in styles for owner in owners)


def _mamba2(layer: Any, tp: int) -> Styles:
    """Heads in groups that share B and C, of one projection with the gate and the step."""
    heads, groups, width = layer.num_heads, layer.n_groups, layer.intermediate_size
    x, keys = Segment(width, heads), Segment(groups * layer.ssm_state_size, groups)
    conv = (x, keys, keys)
    projected = (x, *conv, Segment(heads, heads))
    if heads % tp or not keys.divides(tp) or not _has_rows(layer.in_proj, projected):
        return {}
    local = keys.local(tp)
    sizes = {
        "num_heads": heads // tp,
        "n_groups": local // layer.ssm_state_size,
        "intermediate_size": x.local(tp),
        "conv_dim": x.local(tp) + 2 * local,
        "groups_time_state_size": local,
    }
    buffers = {name: projected for name, _ in layer.named_buffers(recurse=False)}
    norm = _group_norm(layer.norm, groups, width, tp)
    if norm is None or not buffers.keys() <= {"mup_vector"}:
        return {}
    return {
        "": HeadsOfLayer(dict.fromkeys(("A_log", "D", "dt_bias"), 0), sizes, buffers),
        "in_proj": SegmentRows(segments=projected),
        "conv1d": SegmentRows(segments=conv),
        **norm,
        "out_proj": RowwiseParallel(),
    }


def _group_norm(norm: Any, groups: int, width: int, tp: int) -> Styles | None:
    """The style of a norm of groups of channels; None of one that is not known."""
    if next(norm.parameters(), None) is None:
        return {}
    if groups % tp == 0:
        return {"norm": HeadsOfLayer({"weight": 0}, {"n_groups": groups // tp}, enters=False)}
    gates_last = bool(getattr(norm, "norm_before_gate", False))
    style = GroupNormOfParts(groups, gates_last)
    is_known = _is_gated_norm(norm, groups, width, gated=True, gates_last=gates_last)
    return {"norm": style} if is_known else None


def norm_of_parts(norm: Any, width: int) -> ParallelStyle | None:
    """The style of a norm of channels of which each rank has some; None of one that is not known.

    Known is one by the mean square of all.
    """
    named = [name for name, _ in norm.named_parameters()]
    known = named == ["weight"] and hasattr(norm, "variance_epsilon")
    is_known = known and _is_gated_norm(norm, 1, width, gated=False, gates_last=False)
    return GroupNormOfParts(1, gates_last=False) if is_known else None


@torch.no_grad()
def _is_gated_norm(norm: Any, groups: int, width: int, *, gated: bool, gates_last: bool) -> bool:
    """Whether a norm computes what `gated_norm` does, with a gate or without, tried on the host."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(width))
        tried = deepcopy(norm, {id(norm.weight): weight})
        inputs = torch.randn(1 + gated, 1, 3, width).unbind()
        y, w, *gate = (x.unflatten(-1, (groups, -1)) for x in (inputs[0], weight, *inputs[1:]))
        size, eps = width // groups, norm.variance_epsilon
        z = gate[0] if gated else None
        expected = gated_norm(y, z, w, size, eps, lambda sums: sums, gates_last=gates_last)
        return torch.allclose(tried.forward(*inputs), expected.flatten(-2), rtol=1e-4, atol=1e-5)


def _gated_delta(layer: Any, tp: int) -> Styles:
    """A gated delta rule with heads of keys and of values, one decay for each of the latter."""
    key = Segment(layer.key_dim, layer.num_k_heads)
    value = Segment(layer.value_dim, layer.num_v_heads)
    if key.pieces % tp or value.pieces % tp:
        return {}
    conv = (key, key, value)
    sizes = {
        "num_k_heads": key.pieces // tp,
        "num_v_heads": value.pieces // tp,
        "key_dim": key.local(tp),
        "value_dim": value.local(tp),
        "conv_dim": sum(part.local(tp) for part in conv),
    }
    rows = ("in_proj_qkvz", "in_proj_ba", "in_proj_z", "in_proj_b", "in_proj_a")
    return {
        "": HeadsOfLayer({"A_log": 0, "dt_bias": 0}, sizes),
        "in_proj_qkv": SegmentRows(segments=conv),
        **dict.fromkeys((*rows, *(f"{x}_proj" for x in "qkvabg")), ROWS),
        "conv1d": SegmentRows(segments=conv),
        **_norm_and_out(),
    }


def _kimi_delta(layer: Any, tp: int) -> Styles:
    """A delta rule whose decays, one a channel, a module inside makes."""
    heads, gate = layer.num_heads, layer.forget_gate
    part = Segment(layer.qkv_dim, heads)
    if heads % tp:
        return {}
    sizes = {"num_heads": heads // tp, "qkv_dim": part.local(tp), "conv_dim": 3 * part.local(tp)}
    dims = {name: list(p.shape).index(max(p.shape)) for name, p in gate.named_parameters("", False)}
    return {
        "": HeadsOfLayer({}, sizes),
        "conv1d": SegmentRows(segments=(part, part, part)),
        **dict.fromkeys([f"{x}_proj" for x in ("q", "k", "v", "b", "g", "g_b")], ROWS),
        "g_a_proj": WHOLE_FOR_HEADS,
        "forget_gate": HeadsOfLayer(dims, sizes, enters=False),
        "forget_gate.f_a_proj": WHOLE_FOR_HEADS,
        **dict.fromkeys(("forget_gate.f_b_proj", "forget_gate.f_proj"), ROWS),
        **_norm_and_out(),
    }


def _mamba(layer: Any, tp: int) -> Styles:
    """Mamba: each channel has a state, and all make B, C and what a step is made of."""
    width = layer.intermediate_size
    x = Segment(width, width)
    if width % tp or not _has_rows(layer.in_proj, (x, x)) or layer.x_proj.bias is not None:
        return {}
    return {
        "": HeadsOfLayer({"A_log": 0, "D": 0}, {"intermediate_size": width // tp}),
        "in_proj": SegmentRows(segments=(x, x)),
        "conv1d": ROWS,
        "x_proj": SumForHeads(Shard(1)),
        "dt_proj": ROWS,
        **dict.fromkeys(("dt_layernorm", "b_layernorm", "c_layernorm"), WHOLE_FOR_HEADS),
        "out_proj": RowwiseParallel(),
    }


def _zamba(layer: Any, tp: int) -> Styles:
    """Mamba with B and C for each group of channels, whose parameters are by groups."""
    heads = layer.n_mamba_heads
    own = ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D")
    if heads % tp or any(layer.get_parameter(name).shape[0] != heads for name in own):
        return {}
    return {
        "": HeadsOfLayer(dict.fromkeys(own, 0), {"n_mamba_heads": heads // tp}),
        **dict.fromkeys(("in_proj", "conv1d"), ROWS),
        "out_proj": RowwiseParallel(),
    }


def _lightning(layer: Any, tp: int) -> Styles:
    """MiniMax's lightning attention: q, k and v of each head in turn, and a norm of all heads."""
    heads = layer.num_attention_heads
    norm = norm_of_parts(layer.norm, heads * layer.head_dim)
    has_rows = layer.qkv_proj.out_features == 3 * heads * layer.head_dim
    if heads % tp or norm is None or not has_rows:
        return {}
    decays = {name: (Segment(heads, heads),) for name, _ in layer.named_buffers(recurse=False)}
    return {
        "": HeadsOfLayer({}, {"num_attention_heads": heads // tp}, decays),
        **dict.fromkeys(("qkv_proj", "output_gate"), ROWS),
        "norm": norm,
        "out_proj": RowwiseParallel(),
    }


def _short_convolution(layer: Any, tp: int) -> Styles:
    """LFM2's convolution, between two gates for each channel."""
    width = layer.conv.out_channels
    part = Segment(width, width)
    if width % tp or not _has_rows(layer.in_proj, (part, part, part)):
        return {}
    return {
        "": HeadsOfLayer(),
        "in_proj": SegmentRows(segments=(part, part, part)),
        "conv": ROWS,
        "out_proj": RowwiseParallel(),
    }


FORMS: tuple[Callable[[Any, int], Styles], ...] = (
    _mamba2,
    _gated_delta,
    _kimi_delta,
    _mamba,
    _zamba,
    _lightning,
    _short_convolution,
)


def _norm_and_out() -> Styles:
    norms = dict.fromkeys(("norm", "o_norm"), WHOLE_FOR_HEADS)
    return {**norms, **dict.fromkeys(("out_proj", "o_proj"), RowwiseParallel())}


def _has_rows(projection: Any, parts: tuple[Segment, ...]) -> bool:
    return bool(projection.out_features == sum(part.rows for part in parts))
