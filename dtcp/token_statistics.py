"""What is logged of a model's distribution over the vocabulary, token by token, without a gradient.

Preference and policy losses watch entropy and accuracy beside log-probabilities. Over a sharded
vocabulary each is put together from six numbers of each shard.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.logit_sums import (
    LOGITS_PER_CHUNK,
    LabelColumns,
    all_parts,
    check_labels_of,
    chunks,
    vocabulary_shard,
)
from dtcp.sequence.arguments import FLOATS, check_tensor


@dataclass(frozen=True)
class TokenStatistics:
    """Of each token that has a label, [B, L] each, 0 elsewhere.

    Args:
        entropy: in nats.
        mean_logits: over the vocabulary.
        is_top1: 1 where no entry is likelier than the label.
        log_sum_sq_probs: the logarithm of the sum of squared probabilities.
    """

    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor


@torch.no_grad()
def token_statistics(logits: Tensor, labels: Tensor) -> TokenStatistics:
    """Statistics of each token's distribution, fp32 (fp64 for fp64), alike on ranks that share it.

    Args:
        logits: [B, L, V]; or a DTensor with the vocabulary sharded over a 1-D mesh.
        labels: [B, L], shifted already; -100 where a token has none.

    Traffic per rank, sharded vocabulary only: (n - 1) * B * L * 6 numbers.
    """
    check_tensor("Statistics", shape="[B, L, V]", dtypes=FLOATS, logits=logits)
    check_labels_of(logits.shape[:-1], labels)
    vocab_size = logits.shape[-1]
    logits, first, mesh = vocabulary_shard(logits, logits.ndim - 1, "Statistics take logits")
    flat = logits.flatten(0, -2)
    columns = LabelColumns(labels, first, flat.shape[1])
    # A shard without columns has no share in any sum, no largest logit, and no label.
    parts = flat.new_full(
        (6, len(flat)), -torch.inf, dtype=torch.promote_types(flat.dtype, torch.float32)
    )
    parts[2:4] = 0
    for rows in chunks(len(flat), flat.shape[1], LOGITS_PER_CHUNK):
        parts[:, rows] = _of_shard(flat[rows].to(parts.dtype), columns.column[rows, None])
    parts[5].masked_fill_(~columns.mine, -torch.inf)
    shards = parts[None] if mesh is None else all_parts(parts, mesh)
    lse, lse_of_double, expected, total, largest, target = shards.unbind(1)
    whole = lse.logsumexp(0)
    expected = ((lse - whole).exp() * expected).sum(0)
    statistics = (
        whole - expected,
        total.sum(0) / vocab_size,
        (target.amax(0) >= largest.amax(0)).to(parts.dtype),
        lse_of_double.logsumexp(0) - 2 * whole,
    )
    no_label = ~columns.has_loss
    return TokenStatistics(*(x.masked_fill(no_label, 0).view(labels.shape) for x in statistics))


def _of_shard(chunk: Tensor, column: Tensor) -> Tensor:
    """lse, lse of twice the logits, their expectation, sum, largest, the label's: [6, t]."""
    lse = chunk.logsumexp(1)
    expected = ((chunk - lse[:, None]).exp() * chunk).sum(1)
    target = chunk.gather(1, column)[:, 0]
    return torch.stack(
        (lse, (2 * chunk).logsumexp(1), expected, chunk.sum(1), chunk.amax(1), target)
    )
