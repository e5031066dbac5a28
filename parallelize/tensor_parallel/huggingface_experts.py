"""Experts of transformers under tensor parallelism: the channels of every expert are split.

transformers keeps all experts of a layer in one module, as `gate_up_proj` and `down_proj` of
[E, ..], and computes them by functions that read these off the module. Here they read a view of
the module, with this rank's part in the place of each parameter.

Where gate comes before up in a dim of 2F, the parameter becomes [.., 2, F, ..]:
its shards are then those of any DTensor, in checkpoints too, and a checkpoint of the other shape
is refused rather than read in the wrong order.
"""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.forward import wrap_forward
from dtcp.parallelize.tensor_parallel.distribute import distribute_parameter
from dtcp.parallelize.tensor_parallel.local_params import ModuleView, local_parameters
from dtcp.parallelize.tensor_parallel.regions import copy_to_region, reduce_from_region


@dataclass
class HFExpertTensorParallel(ParallelStyle):
    """Split the hidden channels of every expert over the axis; each rank has a part of each.

    Tokens stay where they are. The parts' outputs are summed, once for all experts; a bias that
    is added to them counts once.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        dims = channel_dims(module)
        gate_up = _concatenated_gate_up(module)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if name in gate_up:
                value = parameter.unflatten(dims[name], (2, -1))
                shard = Shard(dims[name] + 1)
                distribute_parameter(module, name, device_mesh, shard, value=value)
            else:
                placement = Shard(dims[name]) if name in dims else Replicate()
                distribute_parameter(module, name, device_mesh, placement)
        unbound, tp = type(module).forward, device_mesh.size()

        def copied(x: Any) -> Any:
            is_float = isinstance(x, Tensor) and x.is_floating_point()
            return copy_to_region(x, device_mesh) if is_float else x

        def on_channels(experts: nn.Module, _: Any, *args: Any, **kwargs: Any) -> Tensor:
            local = local_parameters(experts)
            for name in gate_up:
                local[name] = local[name].flatten(dims[name], dims[name] + 1)
            if "down_proj_bias" in local:
                local["down_proj_bias"] = _share_of_bias(local["down_proj_bias"], tp)
            view = cast(nn.Module, ModuleView(experts, local))
            part = unbound(view, *map(copied, args), **{k: copied(x) for k, x in kwargs.items()})
            return reduce_from_region(part, device_mesh)

        wrap_forward(module, on_channels)
        return module


def channel_dims(module: Any) -> dict[str, int]:
    """The dim of an expert's hidden channels in each parameter that has them."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    up_dim, down_dim = (2, 1) if module.is_transposed else (1, 2)
    return {up: up_dim, f"{up}_bias": 1, "down_proj": down_dim}


def why_not_split(module: Any, tp: int) -> str:
    """Why an experts module of transformers stays whole; empty where its channels can be split."""
    traits = ("has_gate", "has_bias", "is_concatenated", "is_transposed", "has_post_expert_norm")
    if any(trait not in vars(module) for trait in traits):
        return "it does not say how its weights are laid out"
    if module.has_post_expert_norm:
        return "it normalizes the output of each expert, of which a rank would have a part"
    names = {name for name, _ in module.named_parameters(recurse=False)}
    unknown = names - {*channel_dims(module), "down_proj_bias"}
    if unknown:
        return f"its parameters {sorted(unknown)} are not known"
    channels = module.down_proj.shape[1 if module.is_transposed else 2]
    return f"tp={tp} does not divide its {channels} channels" if channels % tp else ""


def _concatenated_gate_up(module: Any) -> tuple[str, ...]:
    """The parameters in which gate comes before up; elsewhere their channels alternate."""
    if not (module.has_gate and module.is_concatenated):
        return ()
    return ("gate_up_proj", "gate_up_proj_bias") if module.has_bias else ("gate_up_proj",)


def _share_of_bias(bias: Tensor, tp: int) -> Tensor:
    """What each rank adds, so that the sum adds the bias once; the gradient is the whole one's."""
    value = bias.detach()
    return value / tp + (bias - value)
