"""One matrix product per group of rows: what the experts of a mixture compute.

Rows arrive sorted by group, and a tensor says where each group ends, so no shape depends on the
data: whatever the router decides, the graph has one node. torch's own grouped product takes no
fp64, needs rows whose size is a multiple of 16 bytes, and on CPU loops over groups as this does.

These ops stay here, unlike those of token mixers: they communicate nothing, so there is nothing
to count.
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from dtcp.local_op import local_op


@local_op("dtcp::grouped_linear")
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of each group by that group's weight.

    Args:
        x: [M, D], sorted by group.
        weight: [E, F, D].
        ends: [E] int32, one past the last row of each group; the last one is M.
    Returns:
        [M, F].
    """
    if _has_grouped_mm(x, *weight.shape[1:]):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    out = x.new_empty(len(x), weight.shape[1])
    for group, rows in enumerate(_group_rows(ends)):
        torch.mm(x[rows], weight[group].T, out=out[rows])
    return out


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@local_op("dtcp::grouped_weight_gradient")
def grouped_weight_gradient(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Gradient of the weight: grad.T @ x over each group's rows, [E, F, D]; 0 for empty groups."""
    if _has_grouped_mm(x, grad.shape[1], x.shape[1]):
        return F.grouped_mm(grad.T, x, offs=ends)
    out = x.new_empty(len(ends), grad.shape[1], x.shape[1])
    for group, rows in enumerate(_group_rows(ends)):
        torch.mm(grad[rows].T, x[rows], out=out[group])
    return out


@grouped_weight_gradient.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _has_grouped_mm(x: Tensor, *widths: int) -> bool:
    """Whether torch's own product takes rows of these widths."""
    whole = all(width * x.element_size() % 16 == 0 for width in widths)
    return x.is_cuda and x.dtype != torch.float64 and whole


def _group_rows(ends: Tensor) -> list[slice]:
    bounds = [0, *ends.tolist()]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    x, weight, ends = ctx.saved_tensors  # type: ignore[attr-defined]
    grad = grad.contiguous()
    return (
        # A view: a copy of all experts' weights would be as many bytes as they have.
        grouped_linear(grad, weight.transpose(1, 2), ends),
        grouped_weight_gradient(grad, x, ends),
        None,
    )


grouped_linear.register_autograd(_backward, setup_context=_save)
