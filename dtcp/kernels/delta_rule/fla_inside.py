"""Gradients inside chunks of the gated delta rule by torch's matmuls, in the place of fla's kernel.

Triton 3.4 to 3.7.0 miscompiles that one on Hopper, and fla refuses to run it there
(flash-linear-attention issue 640).
"""

import torch
from torch import Tensor

from dtcp.kernels.delta_rule.chunks import per_head, summed_per_head

TOKENS_AT_ONCE = 8192
"""Of all rows. Each number that is read becomes several in fp32: with 32 heads of 128, 2 GB for so
many."""


def is_guarded() -> bool:
    """Whether this GPU and this Triton are those that fla's kernel is wrong on."""
    from fla.ops.common import chunk_o

    since = chunk_o.IS_NVIDIA_HOPPER and chunk_o.TRITON_ABOVE_3_4_0
    return bool(since and not chunk_o.TRITON_ABOVE_3_7_1)


def inside_chunks_in_torch(
    q: Tensor,
    k: Tensor,
    decay: Tensor,
    *,
    new: Tensor,
    h: Tensor,
    grad: Tensor,
    d_h: Tensor,
    d_new: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What fla's chunk_bwd_dqkwg computes, in matmuls batched over chunks.

    Chunks are on their own here, so long or many rows are taken in pieces.

    Args:
        q, k: [R, T, G, K], whole chunks.
        decay: [R, T, H], running sum of log2-decay in each chunk.
        new, grad, d_new: [R, T, H, V]; a rule without w, linear attention's, has no d_new.
        h, d_h: [R, N, H, K, V].
    Returns:
        Gradients of q, k and w, and of the decay; contiguous, as the kernels that read them assume.
        Without d_new that of w is empty.
    """
    chunk = q.shape[1] // h.shape[1]
    at_once = max(1, TOKENS_AT_ONCE // (chunk * q.shape[0]))
    results = (
        new.new_empty(q.shape),
        new.new_empty(k.shape),
        new.new_empty(*decay.shape, 0 if d_new is None else k.shape[-1]),
        new.new_empty(decay.shape, dtype=torch.float32),
    )
    for start in range(0, h.shape[1], at_once):
        states = slice(start, start + at_once)
        tokens = slice(start * chunk, (start + at_once) * chunk)
        some = [part[:, tokens] for part in (q, k, decay, new, grad)]
        some += [part[:, states] for part in (h, d_h)]
        writes = None if d_new is None else d_new[:, tokens]
        for result, part in zip(results, _some_chunks(chunk, *some, d_new=writes), strict=True):
            result[:, tokens] = part
    return results


def _some_chunks(
    chunk: int,
    q: Tensor,
    k: Tensor,
    decay: Tensor,
    new: Tensor,
    grad: Tensor,
    h: Tensor,
    d_h: Tensor,
    *,
    d_new: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, key_heads, heads = new.dtype, k.shape[2], new.shape[2]
    q, k = (_by_chunk(per_head(part, heads), chunk) for part in (q, k))
    new, grad = (_by_chunk(part, chunk) for part in (new, grad))
    h, d_h = (part.transpose(1, 2).float() for part in (h, d_h))  # [R, H, N, K, V]
    total = _by_chunk(decay[..., None], chunk)  # [R, H, N, C, 1]
    enter, leave = total.exp2(), (total[..., -1:, :] - total).exp2()
    between = (total - total.mT).masked_fill(~_lower(total), -torch.inf).exp2()

    d_entering, d_leaving = grad @ h.mT, new @ d_h.mT
    d_score = (grad @ new.mT) * between
    dq = d_score @ k + enter * d_entering
    dk = d_score.mT @ q + leave * d_leaving
    dw = q.new_empty(*q.shape[:-1], 0) if d_new is None else -(_by_chunk(d_new, chunk) @ h.mT)
    pairs = d_score * (q @ k.mT)
    entering, leaving = (enter * d_entering * q).sum(-1), (leave * d_leaving * k).sum(-1)
    dg = pairs.sum(-1) - pairs.sum(-2) + entering - leaving
    through = (h * d_h).sum((-2, -1)) * enter[..., -1, 0]
    dg[..., -1] += through + leaving.sum(-1)
    dq, dk, dw, dg = (_by_token(part) for part in (dq, dk, dw, dg[..., None]))
    dq, dk = (summed_per_head(part, key_heads) for part in (dq, dk))
    return dq.to(dtype), dk.to(dtype), dw.to(dtype), dg[..., 0]


def _by_chunk(x: Tensor, chunk: int) -> Tensor:
    """[R, T, H, D] -> [R, H, N, C, D], fp32."""
    return x.transpose(1, 2).unflatten(2, (-1, chunk)).float()


def _by_token(x: Tensor) -> Tensor:
    """[R, H, N, C, D] -> [R, T, H, D]."""
    return x.flatten(2, 3).transpose(1, 2)


def _lower(x: Tensor) -> Tensor:
    chunk = x.shape[-2]
    return torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
