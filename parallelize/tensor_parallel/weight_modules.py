"""Styles of modules that hold one weight and return it: what another module computes with."""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.forward import wrap_forward
from dtcp.parallelize.tensor_parallel.distribute import distribute_parameter


@dataclass
class RowShardedWeight(ParallelStyle):
    """Split the rows of the weight over the axis; each rank gets those of the heads it has.

    For parameters of heads and channels that no projection holds.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute_parameter(module, "weight", device_mesh, Shard(0))
        return _return_local(module, Shard(0))


@dataclass
class ReplicatedWeight(ParallelStyle):
    """Replicate the weight over the axis.

    Args:
        gradient: Partial() where the module that reads the weight is split over the axis, so each
            rank has a part of the gradient; Replicate() where every rank computes all of it.
    """

    gradient: Placement

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute_parameter(module, "weight", device_mesh, Replicate())
        return _return_local(module, self.gradient)


def _return_local(module: nn.Module, gradient: Placement) -> nn.Module:
    placements = (gradient,)

    def local_weight(module: nn.Module, _: Any) -> Tensor:
        return cast(DTensor, module.weight).to_local(grad_placements=placements)

    wrap_forward(module, local_weight)
    return module
