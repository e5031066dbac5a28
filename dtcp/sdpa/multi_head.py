"""nn.MultiheadAttention inside a context: torch's function of it, around an attention of ours.

nn.TransformerEncoderLayer and nn.TransformerDecoderLayer are made of it.

A mode is off while torch runs a function that it was asked about, so the attention inside of that
function would go unseen, and see this rank's tokens alone.
"""

from collections.abc import Callable
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

MULTI_HEAD_ATTENTION = F.multi_head_attention_forward


def attend_by_heads(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    training: bool = True,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """torch's multi_head_attention_forward, where `attend` is F.scaled_dot_product_attention.

    Args:
        query, key, value: [L, B, E], or [L, E] of one row.
        attn_mask: what is_causal says, if that is True, as torch has it.
    """
    _check_options(add_zero_attn, bias_k=bias_k, bias_v=bias_v, **options)
    apart = cast(tuple[Tensor, ...], (q_proj_weight, k_proj_weight, v_proj_weight))
    weights = apart if in_weight is None else in_weight.chunk(3)
    biases = (None,) * 3 if in_bias is None else in_bias.chunk(3)
    one_row = query.ndim == 2
    projected = (
        F.linear(x.unsqueeze(1) if one_row else x, weight, bias)
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    heads = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in projected)
    out = attend(
        *heads,
        attn_mask=None if is_causal else attn_mask,
        dropout_p=dropout_p if training else 0.0,
        is_causal=is_causal,
    )
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias)
    return out.squeeze(1) if one_row else out, None


def _check_options(
    add_zero_attn: bool,
    *,
    need_weights: bool = True,
    use_separate_proj_weight: bool = False,
    average_attn_weights: bool = True,
    **absent: Tensor | None,
) -> None:
    """Refuse what a sharded sequence has not: weights as an output, keys that are no token's."""
    if need_weights:
        raise ValueError(
            "nn.MultiheadAttention on a sharded sequence returns no attention weights, got "
            "need_weights=True: call it with need_weights=False."
        )
    given = [name for name, value in absent.items() if value is not None]
    given += ["add_zero_attn"] if add_zero_attn else []
    if given:
        raise ValueError(
            f"nn.MultiheadAttention on a sharded sequence attends to the tokens that its context "
            f"knows, got {', '.join(given)}: leave it out; documents and padding are `documents=` "
            f"of the context."
        )
