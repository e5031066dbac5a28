"""Experts over the axis tp: each rank has a slice of every expert's channels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.models.moe import Experts

SLICED: Mapping[str, Placement] = {"gate": Shard(1), "up": Shard(1), "down": Shard(2)}
"""The channels between the projections: a dim of each weight."""


@dataclass
class ExpertsSplit(ParallelStyle):
    """Split the hidden channels of all experts over the axis, Megatron's way within each.

    Every rank sees every token and chooses alike, so nothing is sent to an expert: one
    all-reduce of the output, one of the gradients of the inputs. Sharding experts themselves
    would leave ranks idle as routers go.

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
        for name, placement in SLICED.items():
            whole = getattr(module, name)
            part = distribute_tensor(whole, device_mesh, [placement])
            module.register_parameter(name, nn.Parameter(part, whole.requires_grad))
        module.__class__ = _SplitExperts
        cast(_SplitExperts, module).axis = device_mesh
        return module


class _SplitExperts(Experts):
    """Experts that a style has split. Made by the style, never built directly."""

    axis: DeviceMesh

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        out = super().forward(self._enter(x), index, self._enter(weight))
        part = DTensor.from_local(out, self.axis, [Partial()], run_check=False)
        whole = part.redistribute(placements=[Replicate()], async_op=False)
        return whole.to_local(grad_placements=[Replicate()])

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = (
            cast(DTensor, getattr(self, name)).to_local(grad_placements=[placement])
            for name, placement in SLICED.items()
        )
        return gate, up, down

    def _enter(self, x: Tensor) -> Tensor:
        """The same values; their gradients are summed over the ranks, each of which has a part."""
        whole = DTensor.from_local(x, self.axis, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])
