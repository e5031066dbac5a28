"""The styles that a tensor-parallel plan needs beside torch's own."""

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
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
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle
from torch.nn import functional as F


@dataclass
class ReplicatedParams(ParallelStyle):
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
class LocalParams(ParallelStyle):
    """Run a module as it is, on plain tensors, with this rank's part of its own parameters.

    For modules that DTensor's rules do not suit: many small operations, several outputs. Inputs
    are alike on every rank; a gradient of a whole parameter is, too.

    Args:
        placement: of every parameter: Replicate(), or Shard(dim) where each rank has outputs of
            its own, by heads say.
    """

    placement: Placement = field(default_factory=Replicate)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        names = tuple(name for name, _ in module.named_parameters(recurse=False))
        for name in names:
            parameter = module.get_parameter(name)
            own = distribute_tensor(parameter, device_mesh, [self.placement])
            module.register_parameter(name, nn.Parameter(own, parameter.requires_grad))
        forward, own_part = type(module).forward, _OwnPart(module, names, self.placement)
        module.forward = functools.partial(forward, own_part)
        return module


class _OwnPart:
    """What a module's forward takes for its self: the module, but plain tensors as parameters."""

    def __init__(self, module: nn.Module, names: tuple[str, ...], placement: Placement) -> None:
        self._module, self._names, self._placements = module, names, [placement]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if name in self._names:
            return value.to_local(grad_placements=self._placements)
        return value


@dataclass
class AllReduceInputGrad(ParallelStyle):
    """Hand on what all heads read, where each rank has some heads: gradients are summed.

    Traffic per rank, backward: an all-reduce of the module's output.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        forward = module.forward

        def shared(*args: Any, **kwargs: Any) -> Tensor:
            out = forward(*args, **kwargs)
            whole = DTensor.from_local(out, device_mesh, [Replicate()], run_check=False)
            return whole.to_local(grad_placements=[Partial()])

        module.forward = shared
        return module


@dataclass
class ReplicateInput(ParallelStyle):
    """Hand a module its first input, by place or by name, as a DTensor, whole on every rank.

    What several column-wise projections read enters once, so that its gradient, a sum over
    ranks, is reduced once and not by every projection.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        forward = module.forward

        def enter(*args: Any, **kwargs: Any) -> Any:
            if not args:
                first = next(iter(kwargs))
                return forward(**{**kwargs, first: whole(kwargs[first])})
            return forward(whole(args[0]), *args[1:], **kwargs)

        def whole(x: Tensor) -> DTensor:
            return DTensor.from_local(x, device_mesh, [Replicate()], run_check=False)

        module.forward = enter
        return module


@dataclass
class ReplicateInputWithSinks(ReplicateInput):
    """Entered, for attention that has a sink a head, split with the heads."""

    sinks: str = "sinks"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        sinks = module.get_parameter(self.sinks)
        split = distribute_tensor(sinks, device_mesh, [Shard(0)])
        module.register_parameter(self.sinks, nn.Parameter(split, sinks.requires_grad))
        return super()._apply(module, device_mesh)


@dataclass
class VocabParallelEmbedding(ParallelStyle):
    """Split the rows of an embedding over the axis; a rank looks up the tokens whose row it has.

    torch's RowwiseParallel does the same, but makes the gradient of the whole vocabulary on
    every rank before it takes its part (2.13). The vocabulary is a multiple of the axis.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        rows, whole = [Shard(0)], [Replicate()]
        weight = distribute_tensor(module.get_parameter("weight"), device_mesh, rows)
        module.register_parameter("weight", nn.Parameter(weight, weight.requires_grad))
        untrained = cast(nn.Embedding, module).padding_idx

        def look_up(input_ids: Tensor) -> Tensor:
            weight = cast(DTensor, module.weight).to_local(grad_placements=rows)
            row = input_ids - device_mesh.get_local_rank() * len(weight)
            mine = (row >= 0) & (row < len(weight))
            found = F.embedding(row.where(mine, 0), weight).where(mine[..., None], 0)
            if untrained is not None:
                found = found.where((input_ids != untrained)[..., None], found.detach())
            part = DTensor.from_local(found, device_mesh, [Partial()], run_check=False)
            # Waited for here: a tensor still on its way that enters a compiled block loses its
            # gradient without a word (torch 2.13, 2.15). RowwiseParallel hands such tensors out.
            x = part.redistribute(placements=whole, async_op=False)
            # Copied, for FSDP warns of modules that return views.
            return x.to_local(grad_placements=whole).clone()

        module.forward = look_up
        return module


@dataclass
class RowShardedWeight(ParallelStyle):
    """Split the rows of a weight over the axis, of a module that hands the weight out as it is.

    For parameters of heads and channels that no projection holds: each rank gets those of the
    heads it has.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        rows = [Shard(0)]
        whole = module.get_parameter("weight")
        weight = distribute_tensor(whole, device_mesh, rows)
        module.register_parameter("weight", nn.Parameter(weight, whole.requires_grad))
        module.forward = lambda: cast(DTensor, module.weight).to_local(grad_placements=rows)
        return module


@dataclass
class ScaledVocabParallelEmbedding(ParallelStyle):
    """VocabParallelEmbedding for an embedding that does more in its forward than look up.

    The forward runs as it is, on DTensors.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        rows, whole = [Shard(0)], [Replicate()]
        weight = distribute_tensor(module.get_parameter("weight"), device_mesh, rows)
        module.register_parameter("weight", nn.Parameter(weight, weight.requires_grad))
        forward = module.forward
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(
                name, distribute_tensor(buffer, device_mesh, whole), persistent=False
            )

        def look_up(input_ids: Tensor) -> Tensor:
            x = forward(DTensor.from_local(input_ids, device_mesh, whole, run_check=False))
            # Waited for and copied, as VocabParallelEmbedding does.
            x = x.redistribute(placements=whole, async_op=False)
            return x.to_local(grad_placements=whole).clone()

        module.forward = look_up
        return module


@dataclass
class LocalWeight(ParallelStyle):
    """For a module that hands out its weight: replicated over the axis, handed out as local.

    Args:
        gradient: Partial() where what reads the weight is split over the axis, and each rank has
            a part of its gradient; Replicate() where all ranks do the same with it.
    """

    gradient: Placement

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        weight = module.get_parameter("weight")
        whole = distribute_tensor(weight, device_mesh, [Replicate()])
        module.register_parameter("weight", nn.Parameter(whole, weight.requires_grad))
        placements = [self.gradient]

        def hand_out() -> Tensor:
            return cast(DTensor, module.weight).to_local(grad_placements=placements)

        module.forward = hand_out
        return module


@dataclass
class ReplicatedKVHeads(ParallelStyle):
    """Project all kv heads on every rank, and keep those that the rank's query heads read.

    For kv heads that the axis does not divide, where it divides the query heads. The weight is
    whole on every rank; its gradient is summed over them.

    Args:
        heads, kv_heads: of the whole model.
    """

    heads: int
    kv_heads: int

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        weight = module.get_parameter("weight")
        whole = distribute_tensor(weight, device_mesh, [Replicate()])
        module.register_parameter("weight", nn.Parameter(whole, weight.requires_grad))
        forward, mine = module.forward, self.heads // device_mesh.size()
        group = self.heads // self.kv_heads
        # A rank whose query heads read several kv heads takes one for each query head, for
        # ranks may differ in how many they read, and never in their shapes.
        count = 1 if group % mine == 0 else mine
        first = device_mesh.get_local_rank() * mine

        def project(x: Tensor) -> Tensor:
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, device_mesh, [Replicate()], run_check=False)
            out = cast(DTensor, forward(x)).to_local(grad_placements=[Partial()])
            read = (first + torch.arange(count, device=out.device)) // group
            return out.unflatten(-1, (self.kv_heads, -1)).index_select(-2, read).flatten(-2)

        module.forward = project
        return module


def kv_columns(heads: int, kv_heads: int, tp: int) -> ParallelStyle:
    """The style of a projection to kv heads: split, or copied where tp does not divide them."""
    return ReplicatedKVHeads(heads, kv_heads) if kv_heads % tp else ColwiseParallel()


def warn_of_copies(kv_heads: int, tp: int, layers: str) -> None:
    """Say that kv heads are copied, if they are: it costs what the user may not expect."""
    if kv_heads % tp:
        warnings.warn(
            f"tp={tp} does not divide the {kv_heads} kv heads of {layers} layers: every rank of "
            f"tp projects all of them and keeps what its query heads read.",
            stacklevel=4,
        )


def check_divisible(sizes: Mapping[str, int], tp: int) -> None:
    """Refuse a plan whose parts would not be equal.

    Args:
        sizes: what the plan splits, by the names of its config.
    """
    for name, size in sizes.items():
        if size % tp:
            raise ValueError(
                f"Tensor parallelism splits {name} into equal parts, got {name}={size} with "
                f"tp={tp}: choose a tp that divides it, and give the ranks to cp instead."
            )
