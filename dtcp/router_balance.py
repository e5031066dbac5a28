"""The loss that keeps experts evenly used, over the tokens of all ranks.

A product of two means over tokens is no sum over ranks: each rank's own would pull its experts to
be even among its own tokens, a few thousand of one document. So the means are taken over all ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.replicated_loss import sum_for_replicated_loss
from dtcp.sequence.arguments import FLOATS, check_ints, check_tensor


def balance_loss(
    router_logits: Sequence[Tensor],
    mesh: DeviceMesh | None,
    *,
    experts_per_token: int,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """The balance loss of Switch Transformer over all tokens, layers taken together.

    E * sum over experts of (how often it is chosen) * (its mean probability), as transformers'
    load_balancing_loss_func has it. From Fedus et al. 2021, https://arxiv.org/abs/2101.03961,
    equations 4 to 6.

    Args:
        router_logits: of each layer, [T, E] or [B, L, E], of this rank's tokens.
        mesh: the ranks whose tokens make up a batch, ParallelMesh.loss; None for this rank alone.
        padding_mask: [B, L], True for padding, which no expert counts.
    Returns:
        A scalar, the same on all these ranks, fp32 (fp64 for fp64). Each rank gets the gradient of
        its own tokens: those of weights are to be summed.
    Raises:
        ValueError: no logits, or those of other tokens than the mask's.

    Traffic per rank: (n - 1) * (2 * E + 1) numbers, and none back.
    """
    check_ints("A balance loss", least=1, experts_per_token=experts_per_token)
    if not router_logits:
        raise ValueError(
            "A balance loss is one of routers' logits, got router_logits of no layer: call the "
            "model with output_router_logits=True, or leave the balance loss out."
        )
    for logits in router_logits:
        check_tensor("A balance loss", shape="[T, E]", dtypes=FLOATS, router_logits=logits)
    tokens = torch.cat([logits.flatten(0, -2) for logits in router_logits])
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    probability = tokens.to(dtype).softmax(dim=-1)
    is_token = probability.new_ones(len(tokens), 1)
    if padding_mask is not None:
        if padding_mask.numel() * len(router_logits) != len(tokens):
            raise ValueError(
                f"A balance loss counts the tokens of each layer, got padding_mask.shape="
                f"{tuple(padding_mask.shape)} for {len(tokens)} tokens in {len(router_logits)} "
                f"layers: give the mask of these tokens."
            )
        is_token = (~padding_mask.bool()).flatten().to(dtype).repeat(len(router_logits))[:, None]
    chosen = probability.topk(experts_per_token, dim=-1).indices
    counts = torch.zeros_like(probability).scatter_(1, chosen, 1.0)
    sums = torch.cat([(counts * is_token).sum(0), (probability * is_token).sum(0), is_token.sum(0)])
    if mesh is not None:
        sums = sum_for_replicated_loss(sums, mesh)
    experts = probability.shape[1]
    count = sums[-1].clamp(min=1)
    return experts * (sums[:experts] / count * (sums[experts:-1] / count)).sum()
