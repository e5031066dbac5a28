"""The loss of a forecast: the memory and the messages of token_mean_loss, in few ops.

That one works in chunks of rows, thousands of them for a long row, all alike.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dtcp.logit_sums import LOGITS_PER_CHUNK


def stand_in_loss(logits: Tensor) -> Tensor:
    """A scalar of logits [B, L, V] whose backward gives them a gradient of their own size."""
    mesh = None
    if isinstance(logits, DTensor):
        if logits.placements == (Shard(logits.ndim - 1),):
            mesh = logits.device_mesh
        logits = logits.to_local(grad_placements=logits.placements)
    return _Loss.apply(logits.flatten(0, -2), mesh)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, mesh: DeviceMesh | None) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        sums = logits.new_empty((2, len(logits)), dtype=dtype)
        _hold_chunk(logits, dtype)
        if mesh is not None:
            # By DTensor, whose collectives know tensors without memory, on any process group.
            DTensor.from_local(sums, mesh, (Shard(0),), run_check=False).full_tensor()
        ctx.save_for_backward(logits, sums)
        return sums.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, sums = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        _hold_chunk(logits, sums.dtype)
        return grad_logits, None


def _hold_chunk(logits: Tensor, dtype: torch.dtype) -> None:
    rows = min(len(logits), max(1, LOGITS_PER_CHUNK // max(1, logits.shape[1])))
    wide = logits[:rows].to(dtype)  # itself, where it is as wide
    torch.empty_like(wide)
