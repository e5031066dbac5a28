"""Cross-entropy, averaged over the tokens of all ranks.

A rank's share is the sum of its losses divided by the *global* number of tokens. Shares add up to
the mean loss of the batch however unevenly documents, padding and shards fall, so gradients are to
be summed over ranks, never averaged.
"""

from collections.abc import Sequence

from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.gradient_sums import check_output_summed
from dtcp.labels import IGNORED
from dtcp.linear_logits import LinearLogits, checked_head, fused_loss_sum, linear_logit_sums
from dtcp.logit_sums import LogitSums, check_local_labels, logit_sums
from dtcp.sequence.arguments import check_ints, check_kind, check_tensor


def global_token_count(labels: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """Count the tokens that have a loss, on all ranks.

    Args:
        labels: [B, L], local.
        mesh: the ranks whose tokens make up a batch, ParallelMesh.loss; None for this rank alone.
    """
    check_local_labels("A count of tokens", labels)
    kinds = (DeviceMesh, type(None))
    check_kind("A count of tokens", kinds, remedy="give ParallelMesh.loss", mesh=mesh)
    tokens = (labels != IGNORED).sum()
    if mesh is not None:
        dist.all_reduce(tokens, group=mesh.get_group())
    return tokens


def token_mean_loss(
    logits: Tensor | LinearLogits,
    labels: Tensor,
    global_tokens: Tensor | int,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """This rank's share of the mean cross-entropy over all tokens.

    On a rank without a token that has a loss, the share and its gradients are 0; so they are on
    every rank where no rank has one. A label outside of the vocabulary makes the loss inf. Forward
    allocates nothing of the logits' size; backward allocates one such tensor, their gradient, in
    their own dtype.

    Args:
        logits: [B, L, V]; or a DTensor with the vocabulary sharded over a 1-D mesh, as a
            column-wise head gives them; or the LinearLogits of a head, never held all at once.
        labels: [B, L], shifted already; -100 where a token has no loss.
        global_tokens: from `global_token_count`.
        label_smoothing: the share of the target that all entries of the vocabulary have in equal
            parts, as in torch's cross_entropy and transformers' LabelSmoother; from 0 to 1.
        z_loss: this times the square of log(sum(exp(logits))) is added to each token's loss, which
            keeps logits from drifting (PaLM, https://arxiv.org/abs/2204.02311, section 5).
    Returns:
        A scalar, fp32 (fp64 for fp64), the same on all ranks that share these tokens.
    Raises:
        TypeError: logits that are not floating, labels that are not whole numbers.
        ValueError: logits placed in any other way, or of other tokens than the labels; those that a
            model of FSDP2 gave which averages gradients, as far as it shows
            (docs/not_supported.md).

    Traffic per rank, sharded vocabulary only: (n - 1) * B * L * 2 numbers, forward; 3 with
    label_smoothing.
    """
    check_output_summed(logits.hidden if isinstance(logits, LinearLogits) else logits)
    parts = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    return divided_loss(logits, labels, global_tokens, **parts)


def divided_loss(
    logits: Tensor | LinearLogits,
    labels: Tensor,
    tokens: Tensor | int,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """`token_mean_loss`, divided by a number whose gradients may be averaged over ranks."""
    _check_share("label_smoothing", label_smoothing, most=1.0)
    _check_share("z_loss", z_loss)
    if isinstance(logits, LinearLogits):
        logits = checked_head(logits)
        fused = fused_loss_sum(logits, labels, label_smoothing=label_smoothing, z_loss=z_loss)
        if fused is not None:
            return fused / _at_least_one(tokens)
    sums = _sums(logits, labels, with_mean=label_smoothing > 0)
    losses = sums.lse - sums.target
    if sums.mean is not None:
        losses = losses.lerp(sums.lse - sums.mean, label_smoothing)
    if z_loss:
        losses = losses + z_loss * sums.lse.square()
    return losses.sum() / _at_least_one(tokens)


def token_log_probs(logits: Tensor | LinearLogits, labels: Tensor) -> Tensor:
    """Each token's log-probability of its label, 0 where it has none.

    What preference and policy losses are made of: sum it over documents by
    `ShardedBatch.sum_by_document`. Memory is that of token_mean_loss.

    Args:
        logits: as for token_mean_loss.
        labels: [B, L], shifted already; -100 where a token has none. Another label outside of the
            vocabulary gives -inf.
    Returns:
        [B, L], fp32 (fp64 for fp64), the same on all ranks that share these tokens.
    Raises:
        TypeError, ValueError: as token_mean_loss.

    Traffic per rank, sharded vocabulary only: (n - 1) * B * L * 2 numbers, forward.
    """
    sums = _sums(logits, labels)
    return sums.target - sums.lse


def mtp_loss(
    logits: Sequence[Tensor | LinearLogits],
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


def _sums(logits: Tensor | LinearLogits, labels: Tensor, *, with_mean: bool = False) -> LogitSums:
    if isinstance(logits, LinearLogits):
        return linear_logit_sums(logits, labels, with_mean=with_mean)
    return logit_sums(logits, labels, with_mean=with_mean)


def _at_least_one(tokens: Tensor | int) -> Tensor | int:
    """What to divide by: where there is no token there is nothing to divide, and 0 / 0 is NaN."""
    if not isinstance(tokens, Tensor):
        check_ints("A mean over tokens", least=0, global_tokens=tokens)
    elif tokens.numel() != 1:
        raise ValueError(
            f"A mean over tokens is divided by one number, got global_tokens.shape="
            f"{tuple(tokens.shape)}: give the count of all ranks, from global_token_count."
        )
    return tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(tokens, 1)


def _check_share(name: str, value: float, *, most: float = float("inf")) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= most:
        raise ValueError(
            f"A part of a loss has a weight from 0 to {most:g}, got {name}={value!r}: give 0 to "
            f"leave it out."
        )
