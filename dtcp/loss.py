"""Cross-entropy, averaged over the tokens of all ranks.

A rank's share is the sum of its losses divided by the *global* number of tokens. Shares add up to
the mean loss of the batch however unevenly documents, padding and shards fall, so gradients are to
be summed over ranks, never averaged.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dtcp.labels import IGNORED
from dtcp.sequence.arguments import FLOATS, check_ints, check_tensor

LABEL_DTYPES = (torch.int64, torch.int32)

LOGITS_PER_CHUNK = 2**24
"""Logits converted to fp32 at a time: 64 MiB."""


def global_token_count(labels: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """Count the tokens that have a loss, on all ranks.

    Args:
        labels: [B, L], local.
        mesh: the ranks whose tokens make up a batch, ParallelMesh.loss; None for this rank alone.
    """
    check_tensor("A count of tokens", shape="[B, L]", dtypes=LABEL_DTYPES, labels=labels)
    tokens = (labels != IGNORED).sum()
    if mesh is not None:
        dist.all_reduce(tokens, group=mesh.get_group())
    return tokens


def token_mean_loss(logits: Tensor, labels: Tensor, global_tokens: Tensor | int) -> Tensor:
    """This rank's share of the mean cross-entropy over all tokens.

    On a rank without a token that has a loss, the share and its gradients are 0; so they are on
    every rank where no rank has one. A label outside of the vocabulary makes the loss inf. Forward
    allocates nothing of the logits' size; backward allocates one such tensor, their gradient, in
    their own dtype.

    Args:
        logits: [B, L, V]; or a DTensor with the vocabulary sharded over a 1-D mesh, as a
            column-wise head gives them.
        labels: [B, L], shifted already; -100 where a token has no loss.
        global_tokens: from `global_token_count`.
    Returns:
        A scalar, fp32 (fp64 for fp64), the same on all ranks that share these tokens.
    Raises:
        TypeError: logits that are not floating, labels that are not whole numbers.
        ValueError: logits placed in any other way, or of other tokens than the labels.

    Traffic per rank, sharded vocabulary only: (n - 1) * B * L * 2 numbers, forward.
    """
    return _token_losses(logits, labels).sum() / _at_least_one(global_tokens)


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Each token's log-probability of its label, 0 where it has none.

    What preference and policy losses are made of: sum it over documents by
    `ShardedBatch.sum_by_document`. Memory is that of token_mean_loss.

    Args:
        logits: [B, L, V]; or a DTensor with the vocabulary sharded over a 1-D mesh.
        labels: [B, L], shifted already; -100 where a token has none. Another label outside of the
            vocabulary gives -inf.
    Returns:
        [B, L], fp32 (fp64 for fp64), the same on all ranks that share these tokens.
    Raises:
        TypeError, ValueError: as token_mean_loss.

    Traffic per rank, sharded vocabulary only: (n - 1) * B * L * 2 numbers, forward.
    """
    return -_token_losses(logits, labels)


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token, [B, L]; 0 where it has no label."""
    check_tensor("A loss", shape="[B, L, V]", dtypes=FLOATS, logits=logits)
    check_tensor("A loss", shape="[B, L]", dtypes=LABEL_DTYPES, labels=labels)
    first, mesh = 0, None
    if isinstance(logits, DTensor):
        first, mesh = _vocabulary_shard(logits)
        logits = logits.to_local(grad_placements=logits.placements)
    if logits.shape[:-1] != labels.shape or not logits.ndim:
        raise ValueError(
            f"A loss has a label for each token, got logits.shape={tuple(logits.shape)}, "
            f"labels.shape={tuple(labels.shape)}: give [B, L, V] and [B, L]."
        )
    flat = logits.flatten(0, -2)
    losses = _TokenCrossEntropy.apply(flat, labels.flatten() - first, labels, mesh)
    return cast(Tensor, losses).view(labels.shape)


def mtp_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    mtp_labels: Tensor,
    global_tokens: Tensor | int,
    *,
    weight: float = 0.1,
) -> Tensor:
    """token_mean_loss of the next token, plus `weight` times its mean over all depths.

    Every depth is divided by one number of tokens, that of the next-token loss, as in DeepSeek-V3,
    https://arxiv.org/abs/2412.19437, section 2.2.

    Args:
        logits: of the next token, then of each depth; each as for token_mean_loss.
        mtp_labels: [B, depths, L], of `dtcp.labels.look_ahead`, sharded.
    """
    check_tensor("Multi-token prediction", shape="[B, depths, L]", ndim=3, mtp_labels=mtp_labels)
    if not isinstance(logits, Sequence) or not logits:
        raise TypeError(
            f"Multi-token prediction has logits of the next token and of each depth, got logits of "
            f"type {type(logits).__name__}: give them in a tuple."
        )
    first, *further = logits
    if len(further) != mtp_labels.shape[1]:
        raise ValueError(
            f"Multi-token prediction has labels for each depth, got logits of {len(further)} "
            f"depths with mtp_labels.shape={tuple(mtp_labels.shape)}: give [B, depths, L]."
        )
    total = token_mean_loss(first, labels, global_tokens)
    for depth_logits, depth_labels in zip(further, mtp_labels.unbind(1), strict=True):
        loss = token_mean_loss(depth_logits, depth_labels, global_tokens)
        total = total + weight / len(further) * loss
    return total


def _at_least_one(tokens: Tensor | int) -> Tensor | int:
    """What to divide by: where there is no token there is nothing to divide, and 0 / 0 is NaN."""
    if not isinstance(tokens, Tensor):
        check_ints("A mean over tokens", least=0, global_tokens=tokens)
    return tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(tokens, 1)


def _vocabulary_shard(logits: DTensor) -> tuple[int, DeviceMesh | None]:
    """The first entry of the vocabulary that this rank holds, and the ranks that share it."""
    mesh, vocabulary = logits.device_mesh, logits.ndim - 1
    if logits.placements == (Replicate(),):
        return 0, None
    if logits.placements != (Shard(vocabulary),):
        raise ValueError(
            f"A loss takes logits that are whole or sharded in the vocabulary over one axis, got "
            f"logits.placements={logits.placements}: redistribute them to (Shard({vocabulary}),)."
        )
    # The shards of a DTensor are those of torch.chunk: all full except the last ones.
    full = -(-logits.shape[vocabulary] // mesh.size())
    return full * mesh.get_local_rank(), mesh


class _TokenCrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label], by chunks of rows and, maybe, shards of columns: [T]."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, column: Tensor, labels: Tensor, mesh: DeviceMesh | None
    ) -> Tensor:
        """Take logits [T, V], columns of them that the labels stand for [T], labels [B, L]."""
        has_loss = labels.flatten() != IGNORED
        mine = (column >= 0) & (column < logits.shape[1]) & has_loss
        column = column.where(mine, 0)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        lse, target = logits.new_full((2, len(logits)), -torch.inf, dtype=dtype)
        for rows in _chunks(logits):
            chunk = logits[rows].to(dtype)
            lse[rows] = chunk.logsumexp(dim=1)
            target[rows] = chunk.gather(1, column[rows, None])[:, 0]
        # -inf on ranks without that column, so a label that no rank has makes the loss inf.
        target = target.masked_fill(~mine, -torch.inf)
        if mesh is not None:
            lse, target = _across_shards(lse, target, mesh)
        ctx.save_for_backward(logits, column, mine, has_loss, lse)
        return (lse - target).masked_fill(~has_loss, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, column, mine, has_loss, lse = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for rows in _chunks(logits):
            chunk = (logits[rows].to(lse.dtype) - lse[rows, None]).exp()
            chunk.scatter_add_(1, column[rows, None], -mine[rows, None].to(chunk.dtype))
            chunk.masked_fill_(~has_loss[rows, None], 0)
            grad_logits[rows] = chunk.mul_(grad[rows, None]).to(logits.dtype)
        return grad_logits, None, None, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    # A shard beyond the end of a small vocabulary has no columns.
    if not logits.shape[1]:
        return
    rows = max(1, LOGITS_PER_CHUNK // logits.shape[1])
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


def _across_shards(lse: Tensor, target: Tensor, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """lse over the whole vocabulary, and the target's logit from the rank that has it: [T] each."""
    local = torch.stack((lse, target))
    parts = [torch.empty_like(local) for _ in range(mesh.size())]
    dist.all_gather(parts, local, group=mesh.get_group())
    shards = torch.stack(parts)
    return shards[:, 0].logsumexp(dim=0), shards[:, 1].amax(dim=0)
