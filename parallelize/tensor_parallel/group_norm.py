"""A gated RMS norm over groups of channels of which each rank has a part: Mamba-2's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional as F

from dtcp.distributed.collectives import all_gather
from dtcp.forward import wrap_forward
from dtcp.parallelize.tensor_parallel.distribute import distribute_parameter


@dataclass
class GroupNormOfParts(ParallelStyle):
    """Normalize groups of channels that lie on several ranks, which hand each other their squares.

    Args:
        groups: of the whole layer; the axis is a multiple of them.
        gates_last: whether the gate comes behind the norm.

    Traffic per rank: one number per token from each other rank, and as many back.
    """

    groups: int
    gates_last: bool

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute_parameter(module, "weight", device_mesh, Shard(0))
        each = device_mesh.size() // self.groups
        first = device_mesh.get_local_rank() // each * each
        gates_last = self.gates_last

        def of_group(squares: Tensor) -> Tensor:
            parts = all_gather(squares, device_mesh, dim=-1).narrow(-1, first, each)
            return parts.sum(-1, keepdim=True)

        def normalize(norm: Any, _: Any, x: Tensor, gate: Tensor | None = None) -> Tensor:
            weight = cast(DTensor, norm.weight).to_local(grad_placements=[Shard(0)])
            size, eps = x.shape[-1] * each, norm.variance_epsilon
            return gated_norm(x, gate, weight, size, eps, of_group, gates_last=gates_last)

        wrap_forward(module, normalize)
        return module


def gated_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    size: int,
    eps: float,
    of_group: Callable[[Tensor], Tensor],
    *,
    gates_last: bool,
) -> Tensor:
    """x over the root of its mean square, times weight and silu(gate): [.., C].

    Args:
        size: channels of the group.
        of_group: the sum of a group's squares, of that of these channels, [.., 1].
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    factor = 1.0 if gate is None else F.silu(gate.to(wide))
    y = y if gates_last else y * factor
    mean = of_group(y.square().sum(-1, keepdim=True)) / size
    y = weight * (y * torch.rsqrt(mean + eps))
    return (y * factor if gates_last else y).to(x.dtype)
