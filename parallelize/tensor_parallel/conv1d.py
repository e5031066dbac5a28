"""The linear layers of GPT-2, whose weight is [in, out]: `Conv1D` of transformers."""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional as F

from dtcp.forward import wrap_forward
from dtcp.parallelize.tensor_parallel.distribute import distribute_parameter
from dtcp.parallelize.tensor_parallel.regions import reduce_from_region
from dtcp.parallelize.tensor_parallel.segments import RowRoute, Segment


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is such a layer."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


@dataclass
class Conv1DRows(ParallelStyle):
    """Each rank has the outputs of its heads, in each part of the layer.

    Traffic per rank: as of SegmentRows; none where there is one part.
    """

    segments: tuple[Segment, ...]

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, p in list(module.named_parameters(recurse=False)):
            distribute_parameter(module, name, device_mesh, Shard(p.ndim - 1))
        route = RowRoute.of(self.segments, device_mesh.size(), device_mesh.get_local_rank())
        has_parts = len(self.segments) > 1

        def rows(x: Tensor) -> Tensor:
            local = _local(x).t()
            return route.exchange(local, device_mesh) if has_parts else local

        def project(layer: Any, _: Any, x: Tensor) -> Tensor:
            return F.linear(x, rows(layer.weight), rows(layer.bias))

        wrap_forward(module, project)
        return module


@dataclass
class Conv1DSum(ParallelStyle):
    """Sum what the ranks make of the inputs of their heads.

    Traffic per rank: an all-reduce of the output.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute_parameter(module, "weight", device_mesh, Shard(0))
        distribute_parameter(module, "bias", device_mesh, Replicate())

        def project(layer: Any, _: Any, x: Tensor) -> Tensor:
            part = F.linear(x, _local(layer.weight).t())
            return reduce_from_region(part, device_mesh) + _local(layer.bias)

        wrap_forward(module, project)
        return module


def _local(x: Tensor) -> Tensor:
    sharded = cast(DTensor, x)
    return sharded.to_local(grad_placements=sharded.placements)
