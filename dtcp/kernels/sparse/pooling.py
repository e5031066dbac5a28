"""Compression: each window of tokens is pooled into one entry, by a softmax per channel."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation

Finish = Callable[[Tensor, Tensor], Tensor]
"""From pooled windows [B, E, D] and the position ids of their first tokens [B, E] to entries
[B, E, D]."""


class Prepool(NamedTuple):
    """Tokens to pool, with the parameters of the pooling.

    With overlap a token has twice the channels of an entry: the first half goes into the entry
    of the next window, the second half into the entry of its own window.
    """

    value: Tensor  # [B, L, D] or [B, L, 2 D]
    gate: Tensor  # same shape: scores of the softmax over a window's tokens
    bias: Tensor  # [ratio, D] or [ratio, 2 D]: added to the gates, per place in the window
    finish: Finish


class Windows(NamedTuple):
    """Where each window lies among the tokens that are on this rank."""

    end: Tensor  # [B, E] int32: index of its last token; of any token where there is no window
    has_previous: Tensor  # [B, E] int32: 1 if its document has a window before it, else 0
    position_ids: Tensor  # [B, E] int32: position id of its first token


def pool(tokens: Prepool, windows: Windows, *, overlap: bool) -> Tensor:
    """Pool every window into an entry, [B, E, D].

    The softmax runs over the window's tokens (with overlap also over those of the previous
    window), for each channel by itself, in fp32 at least.

    Args:
        tokens: L tokens on this rank.
        windows: E windows of as many tokens as `tokens.bias` has rows.
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
    """Tokens of x [B, L, D] at index [B, E, ratio], within the same row: [B, E, ratio, D]."""
    batch, length = x.shape[:2]
    first = torch.arange(batch, device=x.device, dtype=torch.int32)[:, None, None] * length
    # A window that does not exist, or has none before it, may start before the first token.
    flat = (index.clamp(min=0) + first).flatten()
    return x.flatten(0, 1).index_select(0, flat).unflatten(0, index.shape)
