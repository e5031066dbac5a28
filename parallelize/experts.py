"""Experts under tensor parallelism: each rank has a slice of every expert's hidden channels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.models.moe import Experts
from dtcp.parallelize.tensor_parallel import (
    copy_to_region,
    distribute_parameter,
    reduce_from_region,
)

HIDDEN_CHANNELS: Mapping[str, Placement] = {"gate": Shard(1), "up": Shard(1), "down": Shard(2)}
"""The dim of the channels between the projections, in each weight."""


@dataclass
class ExpertTensorParallel(ParallelStyle):
    """Split the hidden channels of all experts over the axis, as Megatron splits one MLP.

    Every rank sees every token and makes the same choice, so no token is sent to an expert: one
    all-reduce of the output, one of the gradients of the inputs. If the experts themselves were
    sharded, ranks whose experts a router does not choose would idle.

    Raises:
        TypeError: a module that is no dtcp.models.moe.Experts.
        ValueError: a number of channels that the axis does not divide.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, Experts):
            raise TypeError(
                f"{self} splits a dtcp.models.moe.Experts, got a {type(module).__name__}: name the "
                f"experts themselves in the plan."
            )
        channels = module.gate.shape[1]
        if channels % device_mesh.size():
            raise ValueError(
                f"Tensor parallelism splits an expert's channels into equal parts, got "
                f"hidden_dim={channels} with tp={device_mesh.size()}: choose a tp that divides it."
            )
        for name, placement in HIDDEN_CHANNELS.items():
            distribute_parameter(module, name, device_mesh, placement)
        module.__class__ = _TensorParallelExperts
        cast(_TensorParallelExperts, module).mesh = device_mesh
        return module


class _TensorParallelExperts(Experts):
    """Experts that a style has split. Made by the style, never built directly."""

    mesh: DeviceMesh

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        x, weight = copy_to_region(x, self.mesh), copy_to_region(weight, self.mesh)
        return reduce_from_region(super().forward(x, index, weight), self.mesh)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = (
            cast(DTensor, getattr(self, name)).to_local(grad_placements=[placement])
            for name, placement in HIDDEN_CHANNELS.items()
        )
        return gate, up, down
