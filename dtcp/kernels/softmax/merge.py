"""Combine attention over disjoint sets of keys, and attention sinks.

For a query, let out_i and lse_i = log(sum of exp of its scores) be its attention over key set i.
Over the union, lse = log(exp(lse_1) + exp(lse_2)) and each out_i counts with weight
exp(lse_i - lse). A set in which the query sees no key has lse -inf, and weight 0.
From Liu et al. 2023, Ring Attention, section 3, https://arxiv.org/abs/2310.01889
"""

import torch
from torch import Tensor

NOTHING_SEEN = float("-inf")


def merge_into(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Add one more set of keys to (out [B, Q, H, V], lse [B, Q, H]), in place."""
    # exp(part_lse - merged) would be the same but for the rounding of merged: these weights add
    # up to 1 whatever the size of the scores.
    weight = torch.sigmoid(part_lse - lse)
    # Where neither set was seen the difference is -inf - -inf; the weight there is 0.
    weight = weight.masked_fill(part_lse == NOTHING_SEEN, 0.0)
    out.lerp_(part_out, weight[..., None])
    torch.logaddexp(lse, part_lse, out=lse)


def add_sink(out: Tensor, lse: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Let each head's sink take its share of the softmax: one more key, whose value is 0.

    out * sigmoid(lse - sink) is the published form; folding the sink into lse as well makes
    the backward of attention with a sink the backward of attention (block.py).

    Args:
        sink: [H], a score a head; None for none.
    From Xiao et al. 2023, StreamingLLM, section 3, https://arxiv.org/abs/2309.17453
    """
    if sink is None:
        return out, lse
    sink = sink.to(lse.dtype)
    return out * torch.sigmoid(lse - sink)[..., None], torch.logaddexp(lse, sink)


def sink_gradient(grad_out: Tensor, out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Gradient of the sinks: [H]. lse is the one that add_sink returned."""
    row = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)  # [B, L, H]
    return -(torch.exp(sink.to(lse.dtype) - lse) * row).sum((0, 1)).to(sink.dtype)
