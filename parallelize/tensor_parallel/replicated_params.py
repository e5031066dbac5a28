"""A module on whole activations or on a shard of them, its parameters replicated over tp."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.forward import wrap_forward
from dtcp.parallelize.tensor_parallel.distribute import distribute_parameter


@dataclass
class ReplicatedParams(ParallelStyle):
    """Run a module on local activations, its parameters replicated over the axis.

    Every parameter of a model has to live on the same axes, or their gradients have no common
    norm; so a norm's weight is a DTensor too.

    Args:
        activation: the placement of the module's one input. Where it is sharded, each rank has a
            part of the weight's gradient, and DTensor sums the parts.
    """

    activation: Placement = field(default_factory=Replicate)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, _ in list(module.named_parameters(recurse=False)):
            distribute_parameter(module, name, device_mesh, Replicate())
        placements = (self.activation,)

        def on_local(_: nn.Module, forward: Callable[..., Any], x: Tensor) -> Tensor:
            out = forward(DTensor.from_local(x, device_mesh, placements, run_check=False))
            return out.to_local(grad_placements=placements)

        wrap_forward(module, on_local)
        return module


@dataclass
class ReplicatedLinear(ParallelStyle):
    """Run a module on whole activations, and hand its output on as a DTensor.

    For what a column-wise split layer reads alone: the gradient is summed where it comes back.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, _ in list(module.named_parameters(recurse=False)):
            distribute_parameter(module, name, device_mesh, Replicate())

        def on_whole(_: nn.Module, forward: Callable[..., Any], x: Tensor) -> Any:
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, device_mesh, [Replicate()], run_check=False)
            return forward(x)

        wrap_forward(module, on_whole)
        return module
