"""The styles that a tensor-parallel plan needs beside torch's own."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle


@dataclass
class PerToken(ParallelStyle):
    """Run a module on local activations, its parameters replicated over the axis.

    Every parameter of a model has to live on the same axes, or their gradients have no common
    norm; so a norm's weight is a DTensor too.

    Args:
        activation: how the module's one input lies on the axis. Where it is sharded, each rank
            has a part of the weight's gradient, and DTensor adds the parts.
    """

    activation: Placement = field(default_factory=Replicate)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            whole = distribute_tensor(parameter, device_mesh, [Replicate()])
            module.register_parameter(name, nn.Parameter(whole, parameter.requires_grad))
        forward, placements = module.forward, (self.activation,)

        def on_local(x: Tensor) -> Tensor:
            out = forward(DTensor.from_local(x, device_mesh, placements, run_check=False))
            return out.to_local(grad_placements=placements)

        module.forward = on_local
        return module


@dataclass
class Entered(ParallelStyle):
    """Hand a module its first input as a DTensor, whole on every rank of the axis.

    What several column-wise projections read enters once, so that its gradient, a sum over
    ranks, is reduced once and not by every projection.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        forward = module.forward

        def enter(x: Tensor, *rest: Any) -> Any:
            whole = [Replicate()]
            return forward(DTensor.from_local(x, device_mesh, whole, run_check=False), *rest)

        module.forward = enter
        return module


@dataclass
class Waited(ParallelStyle):
    """Apply a style, and have the module's output arrive before anyone reads it.

    DTensor hands out tensors that are waited for at their first use. One that enters a compiled
    block loses its gradient without a word (torch 2.13 and 2.15), so the last eager module before
    a block ends in a copy, which waits.
    """

    style: ParallelStyle

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = self.style._apply(module, device_mesh)
        module.register_forward_hook(_arrived)
        return module


def _arrived(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.clone()
