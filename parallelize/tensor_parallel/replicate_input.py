"""What every part of a split module reads: its gradient is summed over the ranks, once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel

from dtcp.forward import wrap_forward
from dtcp.parallelize.tensor_parallel.distribute import distribute_parameter
from dtcp.parallelize.tensor_parallel.regions import copy_to_region

MEMORY = ("key_value_states", "encoder_hidden_states")
"""Arguments of attention of transformers that are tokens of another sequence."""


@dataclass
class ReplicateInput(ParallelStyle):
    """Hand a module its first input, positional or by name, as a DTensor replicated over the axis.

    What several column-wise projections read becomes a DTensor once, so that its gradient, a sum
    over ranks, is reduced once and not once per projection. So does what keys and values of cross
    attention are made of, which attention of transformers takes by one of two names.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def replicate_first(
            _: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
        ) -> Any:
            names = {key for key in MEMORY if isinstance(kwargs.get(key), Tensor)}
            if not args:
                names.add(next(iter(kwargs)))
            kwargs = {key: replicated(x) if key in names else x for key, x in kwargs.items()}
            return forward(*map(replicated, args[:1]), *args[1:], **kwargs)

        def replicated(x: Tensor) -> DTensor:
            return DTensor.from_local(x, device_mesh, [Replicate()], run_check=False)

        wrap_forward(module, replicate_first)
        return module


@dataclass
class ReplicateInputWithSinks(ReplicateInput):
    """ReplicateInput for attention with one sink per head: the sinks are split with the heads."""

    sinks: str = "sinks"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute_parameter(module, self.sinks, device_mesh, Shard(0))
        return super()._apply(module, device_mesh)


@dataclass
class AllReduceInputGrad(ParallelStyle):
    """Sum the gradients of a module's output, the input of heads of which each rank has some.

    Traffic per rank: backward, an all-reduce of the module's output.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def read_by_heads(
            _: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any
        ) -> Tensor:
            return copy_to_region(forward(*args, **kwargs), device_mesh)

        wrap_forward(module, read_by_heads)
        return module


class RowwiseOwnOutput(RowwiseParallel):
    """RowwiseParallel for a layer whose output is then changed in place: it is no view."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        applied = super()._apply(module, device_mesh)
        applied.register_forward_hook(_cloned)
        return applied


def _cloned(_: nn.Module, __: Any, out: Tensor) -> Tensor:
    return out.clone()
