"""Merge attention over disjoint sets of keys; attention sinks.

For a query, let out_i be its attention over key set i, and lse_i the log of the sum of exp of its
scores there. Over the union, lse = log(exp(lse_1) + exp(lse_2)), and each out_i has weight
exp(lse_i - lse). A set in which the query sees no key has lse -inf, so weight 0.

From Liu et al. 2023, Ring Attention, section 3, https://arxiv.org/abs/2310.01889
"""

import torch
from torch import Tensor

NOTHING_SEEN = float("-inf")


def merge_into(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge one more set of keys into (out [B, Q, H, V], lse [B, Q, H]), in place."""
    # exp(part_lse - merged lse) is the same but for the rounding of the merged lse: with the
    # sigmoid both weights add up to 1 whatever the size of the scores.
    weight = torch.sigmoid(part_lse - lse)
    # Where the query sees neither set the difference is -inf - -inf, and the weight must be 0.
    weight = weight.masked_fill(part_lse == NOTHING_SEEN, 0.0)
    out.lerp_(part_out, weight[..., None])
    torch.logaddexp(lse, part_lse, out=lse)


def add_sink(out: Tensor, lse: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give each head's sink its share of the softmax: that of one more key, whose value is 0.

    out * sigmoid(lse - sink) is the published form. With the sink in lse as well, the backward of
    attention with a sink is the backward of attention itself (block.py).

    Args:
        sink: [H], one score per head, or [B, L, H], one per query; None for no sinks.
    Returns:
        out and lse, new tensors.

    From Xiao et al. 2023, StreamingLLM, section 3, https://arxiv.org/abs/2309.17453
    """
    if sink is None:
        return out, lse
    sink = sink.to(lse.dtype)
    # A query that sees nothing has lse -inf, and so may a sink: their difference is no number.
    weight = torch.sigmoid(lse - sink).masked_fill(lse == NOTHING_SEEN, 0.0)
    return out * weight[..., None], torch.logaddexp(lse, sink)


def sink_gradient(grad_out: Tensor, out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Gradient of the sinks; out and lse are those that add_sink returned."""
    return sink_gradient_of((grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1), lse, sink)


def sink_gradient_of(delta: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Gradient of the sinks, from delta = rowsum(grad_out * out) and lse, [B, L, H] each."""
    weight = torch.exp(sink.to(lse.dtype) - lse).masked_fill(lse == NOTHING_SEEN, 0.0)
    of_queries = -weight * delta
    return (of_queries if sink.ndim == 3 else of_queries.sum((0, 1))).to(sink.dtype)
