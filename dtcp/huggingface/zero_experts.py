"""Experts of LongCat Flash without their loop, which has no graph.

Some of its experts pass a token on unchanged. transformers loops over the experts that some token
has chosen; here all choices are sorted by expert and computed at once, whatever they are. A choice
of an expert that passes on is computed as one of the first expert, and the product is not used.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dtcp.forward import wrap_forward
from dtcp.kernels.grouped_linear import grouped_linear


def compute_without_loop(model: nn.Module) -> bool:
    """Replace the loop of such experts; False in a model without any."""
    all_experts = [m for m in model.modules() if type(m).__name__ == "LongcatFlashExperts"]
    for experts in all_experts:
        wrap_forward(experts, _all_at_once)
    return bool(all_experts)


def _all_at_once(
    experts: Any, _: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """hidden_states [T, D], top_k_index and top_k_weights [T, k] -> [T, D]."""
    number, choices = experts.num_routed_experts, top_k_index.shape[1]
    chosen = top_k_index.flatten()
    computes = chosen < number
    expert = chosen.where(computes, 0)
    order = expert.argsort(stable=True)
    token = order // choices
    rows = hidden_states[token]
    following = torch.arange(1, number + 1, device=rows.device)
    ends = torch.searchsorted(expert[order], following).to(torch.int32)
    gate, up = grouped_linear(rows, experts.gate_up_proj[:number], ends).chunk(2, dim=-1)
    out = grouped_linear(experts.act_fn(gate) * up, experts.down_proj, ends)
    out = out.where(computes[order, None], rows) * top_k_weights.flatten()[order, None]
    return torch.zeros_like(hidden_states).index_add(0, token, out.to(hidden_states.dtype))
