"""Logits of a linear head that are never held: computed some rows at a time, and computed again.

Of S = 128K tokens on 8 ranks and 128K entries, logits are 4 GiB per rank in bf16, their gradient as
much again. A loss reads three numbers of each token; here it has them from chunks of rows, and
backward computes the chunks once more.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from dtcp.autocast import as_autocast_casts, outside_autocast
from dtcp.kernels.linear_cross_entropy import LIGER, HeadDemand, head_kernel, liger_loss_sum
from dtcp.labels import IGNORED
from dtcp.local_op import check_differentiation
from dtcp.logit_sums import (
    DifferentiatedOnce,
    LabelColumns,
    LogitSums,
    RowSums,
    check_labels_of,
    chunks,
    differentiated_once,
    grad_of_rows,
    shaped_sums,
    vocabulary_shard,
)
from dtcp.sequence.arguments import FLOATS, check_factor, check_tensor

LOGITS_PER_CHUNK = 2**26
"""Logits held at a time, in fp32: 256 MiB. Smaller chunks read the head's weight more often."""


@dataclass(frozen=True, eq=False)
class LinearLogits:
    """What a loss takes in the place of logits: softcap * tanh(scale * (hidden @ weight.T + bias)
    / softcap), or without the tanh where softcap is 0. All three are of one dtype, or become that
    of torch.autocast where it is on.

    Args:
        hidden: [B, L, D], the same on all ranks that share the vocabulary.
        weight: [V, D]; or a DTensor with the vocabulary sharded over a 1-D mesh. Its gradient is
            summed over chunks in fp32.
        bias: [V], placed as the weight is.
        kernel: "chunked", in torch; "liger", its fused kernel for mean losses, on GPUs; "auto" for
            Liger where it is installed and can, which the log says once.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    kernel: str = "auto"


def fused_loss_sum(
    logits: LinearLogits, labels: Tensor, *, label_smoothing: float, z_loss: float
) -> Tensor | None:
    """The sum of the losses of all tokens, by a fused kernel; None where chunks compute it.

    Args:
        logits: of `checked_head`.

    Raises:
        ValueError: a kernel is named that cannot.
    """
    hidden, weight, bias = logits.hidden, logits.weight, logits.bias
    demand = HeadDemand(
        hidden.device.type,
        tuple(x.dtype for x in (hidden, weight, *([] if bias is None else [bias]))),
        sharded=isinstance(weight, DTensor),
        hidden_grad=hidden.requires_grad or not torch.is_grad_enabled(),
    )
    if head_kernel(demand, logits.kernel) != LIGER:
        return None
    check_labels_of(hidden.shape[:-1], labels)
    # Liger has gradients from forward on: constants, to a second derivative.
    hidden, weight = DifferentiatedOnce.apply(hidden), DifferentiatedOnce.apply(weight)
    bias = None if bias is None else DifferentiatedOnce.apply(bias)
    if logits.scale != 1.0:
        hidden = hidden * logits.scale
        bias = None if bias is None else bias * logits.scale
    return liger_loss_sum(
        hidden.flatten(0, -2),
        weight,
        bias,
        labels.flatten(),
        ignored=IGNORED,
        softcap=logits.softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )


def linear_logit_sums(
    logits: LinearLogits, labels: Tensor, *, with_mean: bool = False
) -> LogitSums:
    """`logit_sums` of logits that are computed as they are read.

    Traffic per rank, sharded vocabulary only: forward, (n - 1) * B * L * 2 numbers (3 with_mean);
    backward, an all-reduce of hidden's gradient.
    """
    logits = checked_head(logits)
    hidden, weight, bias = logits.hidden, logits.weight, logits.bias
    check_labels_of(hidden.shape[:-1], labels)
    vocab_size = weight.shape[0]
    weight, first, mesh = vocabulary_shard(weight, 0, "A loss takes weights of a head")
    if isinstance(bias, DTensor):
        bias = bias.to_local(grad_placements=bias.placements)
    check_differentiation("A loss over a vocabulary", hidden, weight, bias)
    sums = _LinearSums.apply(
        hidden.flatten(0, -2),
        weight,
        bias,
        labels,
        (first, mesh, vocab_size),
        (logits.scale, logits.softcap),
        with_mean,
    )
    return shaped_sums(sums, labels)


def checked_head(logits: LinearLogits) -> LinearLogits:
    """The same, cast as a linear layer's operands are; refuses what does not fit together."""
    hidden, weight, bias = logits.hidden, logits.weight, logits.bias
    check_tensor("A loss", shape="[B, L, D]", dtypes=FLOATS, hidden=hidden)
    check_tensor("A loss", shape="[V, D]", ndim=2, dtypes=FLOATS, weight=weight)
    factors = {"scale": logits.scale, "softcap": logits.softcap}
    check_factor("Logits of a head", "hidden", **factors)
    if not (math.isfinite(logits.scale) and 0 <= logits.softcap < math.inf):
        raise ValueError(
            f"A head's logits are finite, got scale={logits.scale}, softcap={logits.softcap}: give "
            f"a finite scale, and a softcap above 0, or 0 for none."
        )
    operands: dict[str, Tensor] = {"hidden": hidden, "weight": weight}
    if bias is not None:
        check_tensor("A loss", shape="[V]", ndim=1, dtypes=FLOATS, bias=bias)
        operands["bias"] = bias
    _check_head(hidden, weight, bias)
    cast = dict(zip(operands, as_autocast_casts(*operands.values()), strict=True))
    dtypes = {name: x.dtype for name, x in cast.items()}
    if len(set(dtypes.values())) > 1:
        raise TypeError(
            f"A head computes logits in one floating dtype, got {dtypes}: convert them to one."
        )
    return replace(logits, hidden=cast["hidden"], weight=cast["weight"], bias=cast.get("bias"))


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is not None and (bias.shape != weight.shape[:1] or _placed(bias) != _placed(weight)):
        raise ValueError(
            f"A head adds a number to each entry of the vocabulary, got bias.shape="
            f"{tuple(bias.shape)} placed {_placed(bias)} for weight.shape={tuple(weight.shape)} "
            f"placed {_placed(weight)}: give [V], placed as the weight is."
        )
    if hidden.shape[-1] != weight.shape[1] or isinstance(hidden, DTensor):
        raise ValueError(
            f"A head multiplies hidden states [B, L, D] that each rank holds by a weight [V, D], "
            f"got {type(hidden).__name__} of {tuple(hidden.shape)} for weight.shape="
            f"{tuple(weight.shape)}: give the head's own input."
        )


def _placed(x: Tensor) -> Any:
    """Mesh and placements of a DTensor; None of a plain tensor."""
    return (x.device_mesh, x.placements) if isinstance(x, DTensor) else None


class _LinearSums(torch.autograd.Function):
    """As the Function of logit_sums, of hidden [T, D] and this rank's weight [v, D], bias [v]."""

    @staticmethod
    @outside_autocast
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        shard: tuple[int, DeviceMesh | None, int],
        after: tuple[float, float],
        with_mean: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        first, ctx.mesh, ctx.vocab_size = shard
        ctx.after = after
        ctx.columns = LabelColumns(labels, first, len(weight))
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        sums = RowSums(ctx.columns, hidden, dtype, total=with_mean)
        for rows in chunks(len(hidden), len(weight), LOGITS_PER_CHUNK):
            sums.add(rows, _logits(hidden[rows], weight, bias, after, dtype))
        whole = sums.finish(ctx.mesh, ctx.vocab_size)
        ctx.save_for_backward(hidden, weight, bias, whole[0])
        return sums.masked(whole)

    @staticmethod
    @differentiated_once
    @outside_autocast
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, lse = ctx.saved_tensors
        scale, softcap = ctx.after
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=lse.dtype)
        for rows in chunks(len(hidden), len(weight), LOGITS_PER_CHUNK):
            chunk = _logits(hidden[rows], weight, bias, ctx.after, lse.dtype)
            grad = grad_of_rows(chunk, rows, ctx.columns, lse, grads, ctx.vocab_size)
            if softcap:
                grad = grad * (1 - (chunk / softcap).square())
            if grad_bias is not None:
                grad_bias += scale * grad.sum(0)
            grad = (scale * grad).to(hidden.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.T @ hidden[rows]
        if ctx.mesh is not None:
            dist.all_reduce(grad_hidden, group=ctx.mesh.get_group())
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None, None, None


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    after: tuple[float, float],
    dtype: torch.dtype,
) -> Tensor:
    """Logits [t, v] of some rows."""
    scale, softcap = after
    logits = F.linear(hidden, weight, bias).to(dtype)
    if scale != 1.0:
        logits = logits * scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits
