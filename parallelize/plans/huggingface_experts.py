"""Mixtures of experts of transformers over the axis tp: an expert's channels split, or all whole.

transformers keeps all experts of a layer in one module, as `gate_up_proj` and `down_proj` of
[E, ..], and computes them by functions that read these off the module. They are given a view of
it instead, in which this rank's part stands in the place of each parameter.

Where gate and up lie behind one another in a dim of 2F, the parameter becomes [.., 2, F, ..]:
its shards are then those of any DTensor, in checkpoints too, and a checkpoint of the other shape
is refused, not read in the wrong order.
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

WHOLE, SUMMED = (Replicate(),), (Partial(),)


@dataclass
class Whole(ParallelStyle):
    """Run a module alike on every rank, its parameters replicated, on local activations.

    For a router, whose choice all ranks of the axis have to share.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            _place(module, name, parameter, device_mesh, Replicate())
        forward = type(module).forward

        def on_local(*args: Any, **kwargs: Any) -> Any:
            own = {name: _local(p) for name, p in module.named_parameters(recurse=False)}
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
        dims = channel_dims(module)
        packed = _packed(module)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if name in packed:
                whole = parameter.unflatten(dims[name], (2, -1))
                _place(module, name, whole, device_mesh, Shard(dims[name] + 1))
            elif name in dims:
                _place(module, name, parameter, device_mesh, Shard(dims[name]))
            else:
                _place(module, name, parameter, device_mesh, Replicate())
        forward, tp = type(module).forward, device_mesh.size()

        def enter(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            whole = DTensor.from_local(x, device_mesh, WHOLE, run_check=False)
            return whole.to_local(grad_placements=SUMMED)

        def on_channels(*args: Any, **kwargs: Any) -> Tensor:
            own = {name: _local(p) for name, p in module.named_parameters(recurse=False)}
            for name in packed:
                own[name] = own[name].flatten(dims[name], dims[name] + 1)
            if "down_proj_bias" in own:
                own["down_proj_bias"] = _counted_once(own["down_proj_bias"], tp)
            view = cast(nn.Module, _View(module, own))
            part = forward(view, *map(enter, args), **{k: enter(x) for k, x in kwargs.items()})
            summed = DTensor.from_local(part, device_mesh, SUMMED, run_check=False)
            return summed.redistribute(placements=WHOLE).to_local(grad_placements=WHOLE)

        module.forward = on_channels
        return module


def channel_dims(module: Any) -> dict[str, int]:
    """The dim of an expert's channels in each parameter that has them."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    up_dim, down_dim = (2, 1) if module.is_transposed else (1, 2)
    return {up: up_dim, f"{up}_bias": 1, "down_proj": down_dim}


def _packed(module: Any) -> tuple[str, ...]:
    """The parameters in which gate and up lie behind one another, and not by turns."""
    if not (module.has_gate and module.is_concatenated):
        return ()
    return ("gate_up_proj", "gate_up_proj_bias") if module.has_bias else ("gate_up_proj",)


def why_not_split(module: Any, tp: int) -> str:
    """What keeps an experts module of transformers whole; empty where its channels split."""
    traits = ("has_gate", "has_bias", "is_concatenated", "is_transposed", "has_post_expert_norm")
    if any(trait not in vars(module) for trait in traits):
        return "it does not say how its weights lie"
    if module.has_post_expert_norm:
        return "it has a norm behind each expert, over what would be parts"
    names = {name for name, _ in module.named_parameters(recurse=False)}
    unknown = names - {*channel_dims(module), "down_proj_bias"}
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


def _place(
    module: nn.Module, name: str, whole: Tensor, device_mesh: DeviceMesh, placement: Placement
) -> None:
    placed = distribute_tensor(whole.detach(), device_mesh, [placement])
    module.register_parameter(name, nn.Parameter(placed, whole.requires_grad))


def _local(parameter: Tensor) -> Tensor:
    """A rank's part; a replicated parameter has the same gradient on every rank."""
    placed = cast(DTensor, parameter)
    return placed.to_local(grad_placements=placed.placements)


def _counted_once(bias: Tensor, parts: int) -> Tensor:
    """A rank's share of what is added to each part; its gradient is the whole's on every rank."""
    value = bias.detach()
    return value / parts + (bias - value)
