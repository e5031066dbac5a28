"""A layer that runs its own forward on the heads of its rank."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.forward import wrap_forward
from dtcp.parallelize.tensor_parallel.distribute import distribute_parameter
from dtcp.parallelize.tensor_parallel.local_params import LocalParams, ModuleView, local_parameters
from dtcp.parallelize.tensor_parallel.regions import copy_to_region, reduce_from_region
from dtcp.parallelize.tensor_parallel.segments import Segment, cut, rows_of_heads


@dataclass
class HeadsOfLayer(ParallelStyle):
    """Run a layer as it is, with the parameters and the sizes that its heads on this rank have.

    Args:
        dims: in which the layer's own parameters are split, by name.
        sizes: what the layer reads of itself, by name, for the heads of one rank.
        buffers: the parts of the last dim of buffers that are cut as such, by name.
        enters: whether the layer's input is the same on all ranks; else it comes from a layer
            around it that this style has.

    Traffic per rank: backward, an all-reduce of the input's gradient, if it enters.
    """

    dims: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    buffers: Mapping[str, tuple[Segment, ...]] = field(default_factory=dict)
    enters: bool = True

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, _ in list(module.named_parameters(recurse=False)):
            distribute_parameter(module, name, device_mesh, Shard(self.dims[name]))
        tp, rank = device_mesh.size(), device_mesh.get_local_rank()
        runs = {name: rows_of_heads(parts, tp, rank) for name, parts in self.buffers.items()}
        sizes, enters = dict(self.sizes), self.enters

        def read(x: Tensor) -> Tensor:
            return copy_to_region(x, device_mesh) if enters else x

        def on_heads(layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
            cuts = {name: cut(layer.get_buffer(name), each, -1) for name, each in runs.items()}
            view = ModuleView(layer, {**local_parameters(layer), **sizes, **cuts})
            if args:
                args = (read(args[0]), *args[1:])
            else:
                first = next(iter(kwargs))
                kwargs[first] = read(kwargs[first])
            return forward.__func__(view, *args, **kwargs)

        wrap_forward(module, on_heads)
        return module


@dataclass
class SumForHeads(LocalParams):
    """Sum what the ranks' channels give, for each of them to go on with its heads: no bias.

    Traffic per rank: an all-reduce of the output, and one of its gradient.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        super()._apply(module, device_mesh)

        def summed(_: nn.Module, forward: Any, x: Tensor) -> Tensor:
            return copy_to_region(reduce_from_region(forward(x), device_mesh), device_mesh)

        wrap_forward(module, summed)
        return module


WHOLE_FOR_HEADS = LocalParams(Replicate(), partial=True)
"""The style of what is whole on each rank and computes on its heads, or for them alone."""
