"""How far a student's distribution over the vocabulary is from a teacher's, token by token."""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dtcp.labels import IGNORED
from dtcp.local_op import check_differentiation
from dtcp.logit_sums import (
    LOGITS_PER_CHUNK,
    all_parts,
    check_labels_of,
    chunks,
    differentiated_once,
    vocabulary_shard,
)
from dtcp.sequence.arguments import FLOATS, check_tensor


def token_divergence(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) of each token's distribution; 0 where a token has no label.

    The loss of distillation: sum it and divide by `global_token_count` (and multiply it by
    temperature ** 2, as Hinton et al. do, https://arxiv.org/abs/1503.02531). Neither distribution
    is held; backward allocates the gradient of the student's logits.

    Args:
        student: logits, [B, L, V]; or a DTensor with the vocabulary sharded over a 1-D mesh.
        teacher: logits of the same tokens, placed alike; gets no gradient.
        labels: [B, L], -100 where a token is left out.
        temperature: what both logits are divided by.
    Returns:
        [B, L], fp32 (fp64 for fp64), the same on all ranks that share these tokens.
    Raises:
        ValueError: logits of different shapes or placements, or a temperature that is not above 0.

    Traffic per rank, sharded vocabulary only: (n - 1) * B * L * 3 numbers, forward.
    """
    check_tensor("A divergence", shape="[B, L, V]", dtypes=FLOATS, student=student, teacher=teacher)
    check_labels_of(student.shape[:-1], labels)
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"Logits are divided by a temperature above 0, which is finite, got "
            f"temperature={temperature}: give 1."
        )
    placed = [x.placements if isinstance(x, DTensor) else None for x in (student, teacher)]
    if student.shape != teacher.shape or placed[0] != placed[1]:
        raise ValueError(
            f"A divergence is that of two distributions over one vocabulary, got student of "
            f"{tuple(student.shape)} placed {placed[0]} and teacher of {tuple(teacher.shape)} "
            f"placed {placed[1]}: shard both alike."
        )
    (student, _, mesh), (teacher, *_) = (
        vocabulary_shard(x, x.ndim - 1, "A divergence takes logits") for x in (student, teacher)
    )
    flat = (student.flatten(0, -2), teacher.detach().flatten(0, -2))
    check_differentiation("A divergence", student)
    divergence = _Divergence.apply(*flat, labels.flatten() != IGNORED, mesh, temperature)
    return cast(Tensor, divergence).view(labels.shape)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        has_loss: Tensor,
        mesh: DeviceMesh | None,
        temperature: float,
    ) -> Tensor:
        """Take logits [T, v] of this rank's shard."""
        dtype = torch.promote_types(student.dtype, torch.float32)
        lse = student.new_full((2, len(student)), -torch.inf, dtype=dtype)
        for rows in chunks(len(student), student.shape[1], LOGITS_PER_CHUNK):
            for each, x in zip(lse, (student, teacher), strict=True):
                each[rows] = (x[rows].to(dtype) / temperature).logsumexp(dim=1)
        if mesh is not None:
            lse = all_parts(lse, mesh).logsumexp(dim=0)
        expected = student.new_zeros(len(student), dtype=dtype)
        for rows in chunks(len(student), student.shape[1], LOGITS_PER_CHUNK):
            of_student, of_teacher = _log_probs(student, teacher, lse, rows, temperature)
            terms = of_teacher.exp() * (of_teacher - of_student)
            # A token that the teacher rules out adds nothing, as 0 log 0 is 0.
            expected[rows] = terms.masked_fill_(of_teacher == -math.inf, 0).sum(dim=1)
        if mesh is not None:
            expected = all_parts(expected, mesh).sum(dim=0)
        ctx.save_for_backward(student, teacher, has_loss, lse)
        ctx.temperature = temperature
        return expected.masked_fill(~has_loss, 0)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, has_loss, lse = ctx.saved_tensors
        grad_student = torch.empty_like(student)
        grad = grad / ctx.temperature
        for rows in chunks(len(student), student.shape[1], LOGITS_PER_CHUNK):
            of_student, of_teacher = _log_probs(student, teacher, lse, rows, ctx.temperature)
            chunk = (of_student.exp() - of_teacher.exp()).mul_(grad[rows, None])
            grad_student[rows] = chunk.masked_fill_(~has_loss[rows, None], 0)
        return grad_student, None, None, None, None


def _log_probs(
    student: Tensor, teacher: Tensor, lse: Tensor, rows: slice, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [t, v] of some rows under both."""
    of_student, of_teacher = (
        x[rows].to(lse.dtype) / temperature - each[rows, None]
        for each, x in zip(lse, (student, teacher), strict=True)
    )
    return of_student, of_teacher
