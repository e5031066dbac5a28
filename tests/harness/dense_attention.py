"""What the stand-ins for other people's kernels compute: dense attention in fp64, both ways."""

import torch
from torch import Tensor


def dense_forward(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """out [B, L, H, V] and lse [B, H, L] in fp64; 0 and -inf for a query that sees nothing.

    Args:
        q: [B, L, H, D]; k: [B, K, G, D]; v: [B, K, G, V].
        seen: [B or 1, L, K] bool.
    """
    q, k, v = _wide(q, k, v)
    scores = _scores(q, k, scale, softcap).masked_fill(~seen[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])
    return torch.einsum("bhqk,bkhv->bqhv", weights, v), lse


def dense_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in fp64: weights are rebuilt from the lse given, [B, H, L]."""
    groups = k.shape[2]
    q, k, v = _wide(q, k, v)
    grad_out, out, lse = (x.double() for x in (grad_out, out, lse))
    scores = _scores(q, k, scale, softcap)
    weights = torch.exp(scores - lse[..., None]).masked_fill(~seen[:, None], 0.0)
    dv = torch.einsum("bhqk,bqhv->bkhv", weights, grad_out)
    d_weights = torch.einsum("bqhv,bkhv->bhqk", grad_out, v)
    delta = torch.einsum("bqhv,bqhv->bhq", grad_out, out)
    d_scores = weights * (d_weights - delta[..., None])
    if softcap:
        d_scores = d_scores * (1 - (scores / softcap) ** 2)
    dq = torch.einsum("bhqk,bkhd->bqhd", d_scores, k) * scale
    dk = torch.einsum("bhqk,bqhd->bkhd", d_scores, q) * scale
    return dq, _per_group(dk, groups), _per_group(dv, groups)


def seen_under(
    length: int,
    num_keys: int,
    left: int | None = None,
    right: int | None = None,
    *,
    top_left: bool = False,
) -> Tensor:
    """What a window leaves: [1, L, K] bool; the diagonal is in the bottom right corner."""
    shift = 0 if top_left else num_keys - length
    back = torch.arange(length)[:, None] + shift - torch.arange(num_keys)
    seen = torch.ones(length, num_keys, dtype=torch.bool)
    if left is not None:
        seen &= back <= left
    if right is not None:
        seen &= -back <= right
    return seen[None]


def _wide(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    group = q.shape[2] // k.shape[2]
    return q.double(), *(x.double().repeat_interleave(group, dim=2) for x in (k, v))


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _per_group(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(2, (groups, -1)).sum(3)
