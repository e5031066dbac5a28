"""Compression of tokens: windows of them, each pooled into one entry by a softmax per channel."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation

Finish = Callable[[Tensor, Tensor], Tensor]
"""Pooled windows [B, E, D] and the positions of their first tokens [B, E] -> entries [B, E, D]."""


class Prepool(NamedTuple):
    """Tokens before they are pooled, and how.

    With overlap each has twice the entries' channels: the first half is what a token gives to
    the entry of the window after its own, the second what it gives to its own window's.
    """

    value: Tensor  # [B, L, D] or [B, L, 2 D]
    gate: Tensor  # as value: scores of the softmax over a window's tokens
    bias: Tensor  # [ratio, D] or [ratio, 2 D]: added to the gates, by place in the window
    finish: Finish


class Windows(NamedTuple):
    """Where the tokens of each window stand among the tokens at hand."""

    end: Tensor  # [B, E] int32: index of the last token; some token where there is no window
    has_previous: Tensor  # [B, E] int32, 1 or 0: whether its document has a window before it
    position: Tensor  # [B, E] int32: position of the first token in its document


def pool(tokens: Prepool, windows: Windows, *, overlap: bool) -> Tensor:
    """Pool every window into an entry: [B, E, D].

    The softmax runs over the tokens of the window, with overlap over those of the window before
    it too, each channel by itself, in fp32 at least.
    """
    ratio = tokens.bias.shape[0]
    places = torch.arange(1 - ratio, 1, device=windows.end.device, dtype=torch.int32)
    current = windows.end[..., None] + places  # [B, E, ratio]
    if not overlap:
        return _mix(_take(tokens.value, current), _take(tokens.gate, current) + tokens.bias)
    (old_value, value), (old_gate, gate) = (x.chunk(2, -1) for x in (tokens.value, tokens.gate))
    old_bias, bias = tokens.bias.chunk(2, -1)
    previous = current - ratio
    none = windows.has_previous[..., None, None] == 0
    before = (_take(old_gate, previous) + old_bias).masked_fill(none, float("-inf"))
    gates = torch.cat((before, _take(gate, current) + bias), dim=2)
    return _mix(torch.cat((_take(old_value, previous), _take(value, current)), dim=2), gates)


def _mix(value: Tensor, gate: Tensor) -> Tensor:
    wide = accumulation(value.dtype)
    return (value * gate.to(wide).softmax(dim=2)).sum(dim=2).to(value.dtype)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, K, D] at index [B, E, ratio], each row of the batch by itself."""
    batch, length = x.shape[:2]
    first = torch.arange(batch, device=x.device, dtype=torch.int32)[:, None, None] * length
    # A window that is none, or has none before it, may start before the first token.
    flat = (index.clamp(min=0) + first).flatten()
    return x.flatten(0, 1).index_select(0, flat).unflatten(0, index.shape)
