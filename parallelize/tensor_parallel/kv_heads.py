"""Projections to kv heads, whether tp divides their number or not."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle

from dtcp.forward import wrap_forward
from dtcp.parallelize.tensor_parallel.distribute import distribute_parameter


@dataclass
class ReplicatedKVHeads(ParallelStyle):
    """Project all kv heads on every rank, and keep those that the rank's query heads read.

    For kv heads whose number the axis does not divide, where it divides that of the query heads.
    Every rank holds the whole weight; its gradient is summed over the ranks.

    Args:
        heads, kv_heads: of the whole model.
    """

    heads: int
    kv_heads: int

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute_parameter(module, "weight", device_mesh, Replicate())
        local_heads = self.heads // device_mesh.size()
        group = self.heads // self.kv_heads
        # A rank whose query heads read several kv heads takes one for each query head: ranks may
        # differ in how many they read, but never in their shapes.
        count = 1 if group % local_heads == 0 else local_heads
        first = device_mesh.get_local_rank() * local_heads

        def project(_: nn.Module, forward: Callable[..., Any], x: Tensor) -> Tensor:
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, device_mesh, [Replicate()], run_check=False)
            out = cast(DTensor, forward(x)).to_local(grad_placements=[Partial()])
            index = (first + torch.arange(count, device=out.device)) // group
            return out.unflatten(-1, (self.kv_heads, -1)).index_select(-2, index).flatten(-2)

        wrap_forward(module, project)
        return module


def kv_projection_style(heads: int, kv_heads: int, tp: int) -> ParallelStyle:
    """Split a projection to kv heads over tp, or replicate it where tp does not divide them."""
    return ReplicatedKVHeads(heads, kv_heads) if kv_heads % tp else ColwiseParallel()


def warn_of_replicated_kv_heads(kv_heads: int, tp: int, layers: str) -> None:
    """Say so where kv heads are replicated: it costs what the user may not expect."""
    if kv_heads % tp:
        warnings.warn(
            f"tp={tp} does not divide the {kv_heads} kv heads of {layers} layers: every rank of "
            f"tp projects all of them and keeps what its query heads read.",
            stacklevel=4,
        )
