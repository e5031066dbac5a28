"""Mixtures of experts of transformers over the axis tp: an expert's channels split, or all whole.

transformers keeps all experts of a layer in one module, as `gate_up_proj` and `down_proj` of
[E, ..], and computes them by functions that read these off the module. They are given a view of
it instead, in which this rank's part stands in the place of each parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

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

from dtcp.dispatch import packed_shard

WHOLE, SUMMED = (Replicate(),), (Partial(),)


@dataclass
class Whole(ParallelStyle):
    """Run a module alike on every rank, its parameters replicated, on local activations.

    For a router, whose choice all ranks of the axis have to share.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        names = _distribute(module, device_mesh, {})
        forward = type(module).forward

        def on_local(*args: Any, **kwargs: Any) -> Any:
            own = {name: _local(module, name) for name in names}
            return forward(cast(nn.Module, _View(module, own)), *args, **kwargs)

        module.forward = on_local
        return module


@dataclass
class ExpertChannels(ParallelStyle):
    """Split the inner channels of every expert over the axis; a rank has a part of each expert.

    Tokens stay where they are. What the parts give is added up, once for all experts; a bias
    behind them is counted once.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        names = _distribute(module, device_mesh, channel_placements(module))
        forward, tp = type(module).forward, device_mesh.size()

        def enter(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            whole = DTensor.from_local(x, device_mesh, WHOLE, run_check=False)
            return whole.to_local(grad_placements=SUMMED)

        def on_channels(*args: Any, **kwargs: Any) -> Tensor:
            own = {name: _local(module, name) for name in names if name != "down_proj_bias"}
            if "down_proj_bias" in names:
                own["down_proj_bias"] = _counted_once(_local(module, "down_proj_bias"), tp)
            view = cast(nn.Module, _View(module, own))
            part = forward(view, *map(enter, args), **{k: enter(x) for k, x in kwargs.items()})
            summed = DTensor.from_local(part, device_mesh, SUMMED, run_check=False)
            return summed.redistribute(placements=WHOLE).to_local(grad_placements=WHOLE)

        module.forward = on_channels
        return module


def channel_placements(module: Any) -> dict[str, Placement]:
    """How each parameter of an experts module lies on the axis when channels are split."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    # Gate and up stand one behind the other, or by turns.
    packed = module.has_gate and module.is_concatenated
    up_dim, down_dim = (2, 1) if module.is_transposed else (1, 2)
    return {
        up: packed_shard(up_dim, 2) if packed else Shard(up_dim),
        f"{up}_bias": packed_shard(1, 2) if packed else Shard(1),
        "down_proj": Shard(down_dim),
        "down_proj_bias": Replicate(),
    }


def why_not_split(module: Any, tp: int) -> str:
    """What keeps an experts module of transformers whole; empty where its channels split."""
    traits = ("has_gate", "is_concatenated", "is_transposed", "has_post_expert_norm")
    if any(trait not in vars(module) for trait in traits):
        return "it does not say how its weights lie"
    if module.has_post_expert_norm:
        return "it has a norm behind each expert, over what would be parts"
    names = {name for name, _ in module.named_parameters(recurse=False)}
    unknown = names - channel_placements(module).keys()
    if unknown:
        return f"its parameters {sorted(unknown)} are not known"
    channels = module.down_proj.shape[1 if module.is_transposed else 2]
    return f"tp={tp} does not divide its {channels} channels" if channels % tp else ""


class _View:
    """A module as its own code sees it, with tensors in the place of its parameters."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self.module, self.tensors = module, tensors

    def __getattr__(self, name: str) -> Any:
        return self.tensors[name] if name in self.tensors else getattr(self.module, name)


def _distribute(
    module: nn.Module, device_mesh: DeviceMesh, placements: Mapping[str, Placement]
) -> list[str]:
    """Make the parameters of a module, not those of its parts, DTensors; returns their names."""
    names = []
    for name, parameter in list(module.named_parameters(recurse=False)):
        placed = distribute_tensor(parameter, device_mesh, [placements.get(name, Replicate())])
        module.register_parameter(name, nn.Parameter(placed, parameter.requires_grad))
        names.append(name)
    return names


def _local(module: nn.Module, name: str) -> Tensor:
    """A rank's part; a replicated parameter has the same gradient on every rank."""
    parameter = cast(DTensor, module.get_parameter(name))
    return parameter.to_local(grad_placements=parameter.placements)


def _counted_once(bias: Tensor, parts: int) -> Tensor:
    """A rank's share of what is added to each part; its gradient is the whole's on every rank."""
    value = bias.detach()
    return value / parts + (bias - value)
