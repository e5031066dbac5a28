"""One matrix product a group of rows: what the experts of a mixture compute.

Rows come sorted by group, with the end of every group as a tensor, so no shape depends on data:
one node in a graph, whatever the router decides. torch's own grouped product has no fp64, wants
rows of 16 bytes and, on the CPU, loops as this does.
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.library.custom_op("dtcp::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of each group by the group's own weight.

    Args:
        x: [M, D], sorted by group.
        weight: [E, F, D].
        ends: [E] int32, the row after the last one of each group; the last one is M.
    Returns:
        [M, F].
    """
    if _in_one_kernel(x):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    out = x.new_empty(len(x), weight.shape[1])
    for group, rows in enumerate(_rows(ends)):
        torch.mm(x[rows], weight[group].T, out=out[rows])
    return out


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.shape[1])


@torch.library.custom_op("dtcp::grouped_weight_gradient", mutates_args=())
def grouped_weight_gradient(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Gradient of the weight: grad.T @ x of each group's rows, [E, F, D]; zero without rows."""
    if _in_one_kernel(x):
        return F.grouped_mm(grad.T, x, offs=ends)
    out = x.new_empty(len(ends), grad.shape[1], x.shape[1])
    for group, rows in enumerate(_rows(ends)):
        torch.mm(grad[rows].T, x[rows], out=out[group])
    return out


@grouped_weight_gradient.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(ends), grad.shape[1], x.shape[1])


def _in_one_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def _rows(ends: Tensor) -> list[slice]:
    bounds = [0, *ends.tolist()]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    x, weight, ends = ctx.saved_tensors  # type: ignore[attr-defined]
    grad = grad.contiguous()
    return (
        grouped_linear(grad, weight.transpose(1, 2).contiguous(), ends),
        grouped_weight_gradient(grad, x, ends),
        None,
    )


grouped_linear.register_autograd(_backward, setup_context=_save)
