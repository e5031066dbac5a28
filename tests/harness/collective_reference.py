"""Collectives against their meaning: what all ranks do, done by one process on all ranks' inputs.

Seeds are equal on all ranks, so every rank can make every rank's input and know every output.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.testing import assert_close

from dtcp.distributed.ledger import Traffic, count_traffic

BOUNDARIES = [False, True]
"""Eager and compiled."""


def compiled_or_not(op: Callable[..., Tensor], compiled: bool) -> Callable[..., Tensor]:
    """The op in a graph without breaks, if asked for."""
    return torch.compile(op, backend="aot_eager", fullgraph=True) if compiled else op


def assert_equals_one_process(
    mesh: DeviceMesh,
    op: Callable[[Tensor], Tensor],
    reference: Callable[[list[Tensor]], Sequence[Tensor]],
    shapes: Sequence[Sequence[int]],
    *,
    compiled: bool = False,
) -> tuple[Traffic, Traffic]:
    """Check output and gradient of every rank, in fp64, for the loss that all ranks add up to.

    Args:
        op: this rank's part.
        reference: all ranks' inputs to all ranks' outputs.
        shapes: of each rank's input.
    Returns:
        what the forward and the backward moved.
    """
    rank = mesh.get_local_rank()
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected = reference(inputs)
    cotangents = [torch.randn_like(out) for out in expected]
    loss = sum((out * c).sum() for out, c in zip(expected, cotangents, strict=True))
    expected_grads = torch.autograd.grad(loss, inputs, materialize_grads=True)

    x = inputs[rank].detach().clone().requires_grad_()
    with count_traffic() as forward:
        out = compiled_or_not(op, compiled)(x)
    with count_traffic() as backward:
        (grad,) = torch.autograd.grad(out, x, cotangents[rank])
    assert_close(out, expected[rank])
    assert_close(grad, expected_grads[rank])
    assert out.is_contiguous() and grad.is_contiguous()
    return forward, backward
