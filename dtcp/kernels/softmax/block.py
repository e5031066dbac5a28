"""Dense attention of one block of queries over one block of keys: the unit of the reference.

aten's CPU flash kernel computes it where it can, plain torch elsewhere (on another device, with a
softcap, with values of another width than keys). Both compute in fp32 at least, since the results
of blocks are merged: a block's result rounded to bf16 would lose digits that the merge needs
(FlashAttention issue 2723).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.softmax.merge import NOTHING_SEEN


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    softcap: float,
    score_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend queries to keys.

    Args:
        q: [B, Q, H, D].
        k: [B, K, G, D], K > 0.
        v: [B, K, G, V].
        bias: [B or 1, Q, K], 0 where a query sees a key and -inf where not, in the dtype of
            `accumulation`; None where every query sees every key.
        score_bias: [B or 1, H, Q, K], added to the scores, after the cap; -inf hides a key from a
            head.
    Returns:
        out [B, Q, H, V] and lse [B, Q, H], fp32 (fp64 for fp64); a query that sees no key has
        out 0 and lse -inf.
    """
    q, k, v = (_wide(x) for x in (q, k, v))
    added = _per_head(bias, score_bias)
    if _flash_applies(q, v, softcap):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_heads_first(q, k, v), attn_mask=added, scale=scale
        )
        out, lse = out.transpose(1, 2), lse.transpose(1, 2)
    else:
        scores = _with_bias(_capped_scores(q, k, scale, softcap), added)
        lse = scores.logsumexp(dim=-1)
        weights = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])
        out = torch.einsum("bghqk,bkgv->bqghv", weights, v).flatten(2, 3)
        lse = lse.flatten(1, 2).transpose(1, 2)
    if added is None:
        return out, lse
    # The flash kernel returns lse 0 for a query that sees nothing, which a merge would count. A
    # score bias may hide keys, too: from some heads.
    blind = (added == float("-inf")).all(dim=-1).transpose(1, 2)  # [B or 1, Q, H or 1]
    return out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, NOTHING_SEEN)


def block_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    softcap: float,
    score_bias: Tensor | None = None,
    take_d_scores: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, from out and lse over *all* keys, not only this block's.

    With the final lse the block's weights exp(score - lse) are those of the whole softmax, and
    delta = rowsum(grad_out * out) corrects for all keys: the sum over blocks is exact.

    Args:
        take_d_scores: given the gradients of the scores after the cap, [B, H, Q, K], those of a
            score bias; where there is one.
    Returns:
        dq [B, Q, H, D], dk [B, K, G, D], dv [B, K, G, V], fp32 (fp64 for fp64).

    From Dao 2023, FlashAttention-2, section 3.1.2, https://arxiv.org/abs/2307.08691
    """
    grad_out, q, k, v, out = (_wide(x) for x in (grad_out, q, k, v, out))
    # A query that sees nothing has lse -inf; with any finite value its hidden keys have weight 0.
    lse = lse.masked_fill(lse == NOTHING_SEEN, 0.0)
    if take_d_scores is None and _flash_applies(q, v, softcap):
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_heads_first(grad_out, q, k, v, out),
            lse.transpose(1, 2),
            0.0,
            False,
            attn_mask=_per_head(bias, score_bias),
            scale=scale,
        )
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv
    capped = _capped_scores(q, k, scale, softcap)
    scores = _with_bias(capped, _per_head(bias, score_bias))
    by_group = capped.shape[1:3]
    weights = torch.exp(scores - lse.unflatten(2, by_group).permute(0, 2, 3, 1)[..., None])
    grad_grouped = grad_out.unflatten(2, by_group)
    dv = torch.einsum("bghqk,bqghv->bkgv", weights, grad_grouped)
    d_weights = torch.einsum("bqghv,bkgv->bghqk", grad_grouped, v)
    delta = (grad_out * out).sum(-1).unflatten(2, by_group).permute(0, 2, 3, 1)
    d_scores = weights * (d_weights - delta[..., None])
    if take_d_scores is not None:
        take_d_scores(d_scores.flatten(1, 2))
    if softcap != 0.0:
        d_scores = d_scores * (1.0 - (capped / softcap) ** 2)
    dq = torch.einsum("bghqk,bkgd->bqghd", d_scores, k).flatten(2, 3) * scale
    dk = torch.einsum("bghqk,bqghd->bkgd", d_scores, q.unflatten(2, by_group)) * scale
    return dq, dk, dv


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulation(x.dtype))


def _flash_applies(q: Tensor, v: Tensor, softcap: float) -> bool:
    return q.device.type == "cpu" and softcap == 0.0 and q.shape[-1] == v.shape[-1]


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def _per_head(bias: Tensor | None, score_bias: Tensor | None) -> Tensor | None:
    """All that is added to scores: [B or 1, H or 1, Q, K]."""
    if score_bias is None:
        return None if bias is None else bias[:, None]
    return score_bias if bias is None else score_bias + bias[:, None]


def _with_bias(scores: Tensor, bias: Tensor | None) -> Tensor:
    """scores [B, G, H / G, Q, K] and what is added to them."""
    if bias is None:
        return scores
    by_group = (1, 1) if bias.shape[1] == 1 else scores.shape[1:3]
    return scores + bias.unflatten(1, by_group)


def _capped_scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """[B, G, H / G, Q, K], before anything is added to them."""
    groups = k.shape[2]
    grouped = q.unflatten(2, (groups, q.shape[2] // groups))
    scores = torch.einsum("bqghd,bkgd->bghqk", grouped, k) * scale
    return scores if softcap == 0.0 else softcap * torch.tanh(scores / softcap)
