"""Entropies of next tokens with their gradient: the bonus of a policy's loss.

Of logits z with probabilities p, H = lse(z) - E[z], and dH / dz_j = p_j * (E[z] - z_j).
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtcp.local_op import check_differentiation
from dtcp.logit_sums import (
    LOGITS_PER_CHUNK,
    LabelColumns,
    all_parts,
    check_labels_of,
    chunks,
    differentiated_once,
    vocabulary_shard,
)
from dtcp.sequence.arguments import FLOATS, check_tensor


def token_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Each token's entropy in nats, 0 where it has no label.

    Args:
        logits, labels: as for token_log_probs; no LinearLogits.
    Returns:
        [B, L], fp32 (fp64 for fp64), the same on all ranks that share these tokens.

    Traffic per rank, sharded vocabulary only: (n - 1) * B * L * 2 numbers, forward.
    """
    check_tensor("An entropy", shape="[B, L, V]", dtypes=FLOATS, logits=logits)
    check_labels_of(logits.shape[:-1], labels)
    logits, first, mesh = vocabulary_shard(logits, logits.ndim - 1, "An entropy takes logits")
    check_differentiation("An entropy over a vocabulary", logits)
    flat = logits.flatten(0, -2)
    columns = LabelColumns(labels, first, flat.shape[1])
    entropy: Tensor = _Entropy.apply(flat, columns.has_loss, mesh)
    return entropy.view(labels.shape)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, counts: Tensor, mesh: DeviceMesh | None) -> Tensor:
        """Take logits [T, v] of this rank's shard, and which tokens have a label, [T]."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        # lse, and E[z] within the shard; one without columns has no share.
        parts = logits.new_full((2, len(logits)), -torch.inf, dtype=dtype)
        parts[1] = 0
        for rows in chunks(len(logits), logits.shape[1], LOGITS_PER_CHUNK):
            chunk = logits[rows].to(dtype)
            lse = chunk.logsumexp(1)
            parts[0, rows] = lse
            parts[1, rows] = ((chunk - lse[:, None]).exp_().mul_(chunk)).sum(1)
        shards = parts[None] if mesh is None else all_parts(parts, mesh)
        lse = shards[:, 0].logsumexp(0)
        expected = ((shards[:, 0] - lse).exp() * shards[:, 1]).sum(0)
        ctx.save_for_backward(logits, counts, lse, expected)
        return (lse - expected).masked_fill(~counts, 0)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, counts, lse, expected = ctx.saved_tensors
        grad = grad.masked_fill(~counts, 0)
        of_logits = torch.empty_like(logits)
        for rows in chunks(len(logits), logits.shape[1], LOGITS_PER_CHUNK):
            chunk = logits[rows].to(lse.dtype)
            share = (chunk - lse[rows, None]).exp_().mul_(grad[rows, None])
            of_logits[rows] = share.mul_(expected[rows, None] - chunk)
        return of_logits, None, None
