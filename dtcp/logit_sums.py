"""What losses read of logits, token by token, over a vocabulary that may be sharded."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dtcp.labels import IGNORED
from dtcp.local_op import check_differentiation
from dtcp.sequence.arguments import FLOATS, check_tensor

LABEL_DTYPES = (torch.int64, torch.int32)

LOGITS_PER_CHUNK = 2**24
"""Logits converted to fp32 at a time: 64 MiB."""


@dataclass(frozen=True)
class LogitSums:
    """What losses read of the logits of each token that has a label: [B, L] each, 0 elsewhere.

    Args:
        lse: the logarithm of the sum of exponentials, over the whole vocabulary.
        target: the label's logit.
        mean: over the whole vocabulary.
    """

    lse: Tensor
    target: Tensor
    mean: Tensor | None


def logit_sums(logits: Tensor, labels: Tensor, *, with_mean: bool = False) -> LogitSums:
    """Sums over a vocabulary that may be sharded; arguments and errors are token_mean_loss's."""
    check_tensor("A loss", shape="[B, L, V]", dtypes=FLOATS, logits=logits)
    vocab_size = logits.shape[-1] if logits.ndim else 0
    logits, first, mesh = vocabulary_shard(logits, logits.ndim - 1, "A loss takes logits")
    check_labels_of(logits.shape[:-1], labels)
    check_differentiation("A loss over a vocabulary", logits)
    sums = _LogitSums.apply(logits.flatten(0, -2), labels, first, mesh, vocab_size, with_mean)
    return shaped_sums(sums, labels)


def check_local_labels(subject: str, labels: Tensor) -> None:
    """Refuse labels that are no whole numbers, or not those of this rank alone."""
    check_tensor(subject, shape="[B, L]", dtypes=LABEL_DTYPES, labels=labels)
    if isinstance(labels, DTensor):
        raise TypeError(
            f"{subject} reads the labels of this rank, got a DTensor placed {labels.placements}: "
            f"give labels.to_local()."
        )


def check_labels_of(tokens: torch.Size, labels: Tensor) -> None:
    """Refuse labels that are not one for each token of [B, L, ..]."""
    check_local_labels("A loss", labels)
    if tokens != labels.shape or not tokens:
        raise ValueError(
            f"A loss has a label for each token, got logits of {tuple(tokens)} tokens with "
            f"labels.shape={tuple(labels.shape)}: give [B, L, V] and [B, L]."
        )


def shaped_sums(sums: Any, labels: Tensor) -> LogitSums:
    """The sums of [T] tokens in the shape of their labels."""
    lse, target, mean = (None if x is None else x.view(labels.shape) for x in sums)
    assert lse is not None and target is not None
    return LogitSums(lse, target, mean)


def vocabulary_shard(
    x: Tensor, vocabulary: int, subject: str
) -> tuple[Tensor, int, DeviceMesh | None]:
    """This rank's entries of the vocabulary, which is the first, and the ranks that share it.

    Args:
        x: whole, or a DTensor.
        vocabulary: its dim in x.
    """
    if not isinstance(x, DTensor):
        return x, 0, None
    mesh, local = x.device_mesh, x.to_local(grad_placements=x.placements)
    if x.placements == (Replicate(),):
        return local, 0, None
    if x.placements != (Shard(vocabulary),):
        raise ValueError(
            f"{subject} that are whole or sharded in the vocabulary over one axis, got "
            f"placements={x.placements}: redistribute them to (Shard({vocabulary}),)."
        )
    # The shards of a DTensor are those of torch.chunk: all full except the last ones.
    full = -(-x.shape[vocabulary] // mesh.size())
    return local, full * mesh.get_local_rank(), mesh


class LabelColumns:
    """Which of this rank's columns are the labels' of some tokens.

    Args:
        labels: [B, L].
        first: the first entry of the vocabulary that this rank holds.
        width: how many it holds.
    """

    def __init__(self, labels: Tensor, first: int, width: int) -> None:
        flat = labels.flatten()
        column = flat - first
        self.has_loss = flat != IGNORED
        self.mine = (column >= 0) & (column < width) & self.has_loss
        self.column = column.where(self.mine, 0)


class RowSums:
    """lse, the label's logit and the mean of the logits of T tokens, found rows by rows: [T]."""

    def __init__(self, columns: LabelColumns, like: Tensor, dtype: torch.dtype, *, total: bool):
        tokens = len(columns.column)
        self.columns = columns
        self.lse, self.target = like.new_full((2, tokens), -torch.inf, dtype=dtype)
        self.total = like.new_zeros(tokens, dtype=dtype) if total else None

    def add(self, rows: slice, chunk: Tensor) -> None:
        """The logits of some rows, [t, v], in the dtype of the sums."""
        self.lse[rows] = chunk.logsumexp(dim=1)
        self.target[rows] = chunk.gather(1, self.columns.column[rows, None])[:, 0]
        if self.total is not None:
            self.total[rows] = chunk.sum(dim=1)

    def finish(self, mesh: DeviceMesh | None, vocab_size: int) -> list[Tensor]:
        """lse, target and maybe mean, over the shards of all ranks."""
        # -inf on ranks without that column, so a label that no rank has makes the loss inf.
        sums = [self.lse, self.target.masked_fill(~self.columns.mine, -torch.inf)]
        sums += [] if self.total is None else [self.total]
        if mesh is not None:
            parts = all_parts(torch.stack(sums), mesh)
            sums = [parts[:, 0].logsumexp(dim=0), parts[:, 1].amax(dim=0)]
            sums += [] if self.total is None else [parts[:, 2].sum(dim=0)]
        if self.total is not None:
            sums[2] = sums[2] / vocab_size
        return sums

    def masked(self, sums: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """The sums, 0 where a token has no loss."""
        no_loss = ~self.columns.has_loss
        lse, target, *mean = (x.masked_fill(no_loss, 0) for x in sums)
        return lse, target, mean[0] if mean else None


def grad_of_rows(
    chunk: Tensor,
    rows: slice,
    columns: LabelColumns,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor | None],
    vocab_size: int,
) -> Tensor:
    """The gradient of some rows of logits, [t, v], written over a copy of them.

    Args:
        grads: of lse, target and mean: [T] each.
    """
    grad_lse, grad_target, grad_mean = grads
    chunk = (chunk - lse[rows, None]).exp_().mul_(grad_lse[rows, None])
    target = (grad_target[rows] * columns.mine[rows])[:, None]
    chunk.scatter_add_(1, columns.column[rows, None], target)
    if grad_mean is not None:
        chunk.add_(grad_mean[rows, None] / vocab_size)
    return chunk.masked_fill_(~columns.has_loss[rows, None], 0)


def differentiated_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose gradients have no derivative of their own, and say so if one is asked for.

    torch's once_differentiable gives those that follow from what was saved a derivative of zero.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not again:
            return gradients
        sources = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
        return tuple(None if x is None else _Once.apply(x, *sources) for x in gradients)

    return run


class _Once(torch.autograd.Function):
    """A gradient that depends on its sources, in a way that nobody has differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "A loss over a vocabulary is differentiated once, got a second derivative of its "
            "logits: leave create_graph out, or compute it by torch.nn.functional.cross_entropy."
        )


class DifferentiatedOnce(torch.autograd.Function):
    """An input as it is, for a loss of others whose gradients have no derivative of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad,)


class _LogitSums(torch.autograd.Function):
    """lse, the label's logit and the mean, by chunks of rows and, maybe, shards of columns: [T]."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        first: int,
        mesh: DeviceMesh | None,
        vocab_size: int,
        with_mean: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take logits [T, v], the shard of this rank that begins with entry `first`."""
        ctx.columns = LabelColumns(labels, first, logits.shape[1])
        dtype = torch.promote_types(logits.dtype, torch.float32)
        sums = RowSums(ctx.columns, logits, dtype, total=with_mean)
        for rows in chunks(len(logits), logits.shape[1], LOGITS_PER_CHUNK):
            sums.add(rows, logits[rows].to(dtype))
        whole = sums.finish(mesh, vocab_size)
        ctx.vocab_size = vocab_size
        ctx.save_for_backward(logits, whole[0])
        return sums.masked(whole)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        logits, lse = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows in chunks(len(logits), logits.shape[1], LOGITS_PER_CHUNK):
            chunk = logits[rows].to(lse.dtype)
            grad[rows] = grad_of_rows(chunk, rows, ctx.columns, lse, grads, ctx.vocab_size)
        return grad, None, None, None, None, None


def chunks(tokens: int, width: int, logits_per_chunk: int) -> Iterator[slice]:
    """Rows of so many logits at most; none of a shard without columns."""
    # A shard beyond the end of a small vocabulary has no columns.
    if not width:
        return
    rows = max(1, logits_per_chunk // width)
    for start in range(0, tokens, rows):
        yield slice(start, start + rows)


def all_parts(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """x of every rank: [n, ...]."""
    parts = [torch.empty_like(x) for _ in range(mesh.size())]
    dist.all_gather(parts, x, group=mesh.get_group())
    return torch.stack(parts)
