"""Experts of transformers: the form of their weights, and their channels split over tp.

transformers keeps all experts of a layer in one module, as `gate_up_proj` and `down_proj` of
[E, ..], and computes them by functions that read these off the module. Here they read a view of
the module, with this rank's part in the place of each parameter.

Where gate comes before up in a dim of 2F, the parameter becomes [.., 2, F, ..], on every mesh:
its shards are then those of any DTensor, and a checkpoint of one mesh is one of all. The other
shape is refused rather than read in the wrong order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.forward import wrap_forward
from dtcp.parallelize.tensor_parallel.distribute import distribute_parameter
from dtcp.parallelize.tensor_parallel.local_params import ModuleView, local_parameters
from dtcp.parallelize.tensor_parallel.regions import copy_to_region, reduce_from_region


def separate_gate_and_up(model: nn.Module) -> None:
    """Give gate and up a dim of their own, [.., 2, F, ..], in all experts that have them joined."""
    for module in model.modules():
        dims = _joined_dims(module)
        for name, dim in dims.items():
            parameter = module.get_parameter(name)
            separate = nn.Parameter(parameter.detach().unflatten(dim, (2, -1)))
            separate.requires_grad = parameter.requires_grad
            module.register_parameter(name, separate)
        if dims:
            vars(module)[_SEPARATE] = dims
            wrap_forward(module, _on_joined)


_SEPARATE = "dtcp_separate_dims"
"""Where a module keeps the dims of 2, by the names of the parameters that have them."""


def join_gate_and_up(model: nn.Module, name: str, whole: Tensor) -> Tensor:
    """A whole parameter as transformers has it: gate and up in one dim."""
    owner, _, own_name = name.rpartition(".")
    dim = vars(model.get_submodule(owner)).get(_SEPARATE, {}).get(own_name)
    return whole if dim is None else whole.flatten(dim, dim + 1)


def _on_joined(module: nn.Module, _: Any, *args: Any, **kwargs: Any) -> Any:
    parameters = dict(module.named_parameters(recurse=False))
    return _view(module, parameters).forward_of_type(*args, **kwargs)


@dataclass
class WholeExperts(ParallelStyle):
    """Keep all of every expert on each rank of the axis."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, _ in list(module.named_parameters(recurse=False)):
            distribute_parameter(module, name, device_mesh, Replicate())
        wrap_forward(module, _on_local_experts)
        return module


def _on_local_experts(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    view = _view(module, local_parameters(module))
    if _SEPARATE in vars(module):
        return view.forward_of_type(*args, **kwargs)
    # What it ran before: that of its class, or one without its loop.
    return forward.__func__(view, *args, **kwargs)


@dataclass
class HFExpertTensorParallel(ParallelStyle):
    """Split the hidden channels of every expert over the axis; each rank has a part of each.

    Tokens stay where they are. The parts' outputs are summed, once for all experts; a bias that
    is added to them counts once.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        dims, separate = _channel_dims(module), vars(module).get(_SEPARATE, {})
        for name, _ in list(module.named_parameters(recurse=False)):
            placement = Shard(dims[name] + (name in separate)) if name in dims else Replicate()
            distribute_parameter(module, name, device_mesh, placement)
        tp = device_mesh.size()

        def copied(x: Any) -> Any:
            is_float = isinstance(x, Tensor) and x.is_floating_point()
            return copy_to_region(x, device_mesh) if is_float else x

        def on_channels(experts: nn.Module, _: Any, *args: Any, **kwargs: Any) -> Tensor:
            local = local_parameters(experts)
            if "down_proj_bias" in local:
                local["down_proj_bias"] = _share_of_bias(local["down_proj_bias"], tp)
            view, args = _view(experts, local), tuple(map(copied, args))
            part = view.forward_of_type(*args, **{k: copied(x) for k, x in kwargs.items()})
            return reduce_from_region(part, device_mesh)

        wrap_forward(module, on_channels)
        return module


def _view(experts: nn.Module, tensors: Mapping[str, Tensor]) -> ModuleView:
    """The module with these parameters, gate and up joined again."""
    return ModuleView(experts, joined_view(experts, tensors))


def joined_view(experts: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The module's parameters with gate and up joined again, as transformers has them."""
    separate = vars(experts).get(_SEPARATE, {})
    joined = {name: tensors[name].flatten(dim, dim + 1) for name, dim in separate.items()}
    return {**tensors, **joined}


def _channel_dims(module: Any) -> dict[str, int]:
    """The dim of an expert's hidden channels in each parameter that has them."""
    layout = _layout(module)
    up = "gate_up_proj" if layout["has_gate"] else "up_proj"
    up_dim, down_dim = (2, 1) if layout["is_transposed"] else (1, 2)
    return {up: up_dim, f"{up}_bias": 1, "down_proj": down_dim}


TRAITS = ("has_gate", "has_bias", "is_concatenated", "is_transposed")
"""What an experts module of transformers says of the layout of its weights."""


LAYOUTS: Mapping[str, Mapping[str, bool]] = {
    "Llama4TextExperts": {
        **dict.fromkeys(("has_gate", "is_concatenated", "is_transposed"), True),
        "has_bias": False,
    },
}
"""The same of classes that do not say it, by their names: their experts compute on all tokens."""


def _layout(module: Any) -> Mapping[str, bool]:
    """What is known of the layout of a module's weights; nothing, if not all is."""
    own = {trait: vars(module)[trait] for trait in TRAITS if trait in vars(module)}
    return own if len(own) == len(TRAITS) else LAYOUTS.get(type(module).__name__, {})


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the experts of a layer of transformers, stacked."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and hasattr(module, "num_experts")


def why_not_known(module: Any) -> str:
    """Why experts of transformers cannot be computed by their weights alone; empty if they can."""
    if any(trait not in vars(module) for trait in TRAITS):
        return "it does not say how its weights are laid out"
    # transformers 5.17 does not say so, and has no such experts.
    if vars(module).get("has_post_expert_norm", False):
        return "it normalizes the output of each expert, of which a rank would have a part"
    names = {name for name, _ in module.named_parameters(recurse=False)}
    unknown = names - {*_channel_dims(module), "down_proj_bias"}
    return f"its parameters {sorted(unknown)} are not known" if unknown else ""


def why_not_split(module: Any, tp: int) -> str:
    """Why an experts module of transformers stays whole; empty where its channels can be split."""
    reason = "" if type(module).__name__ in LAYOUTS else why_not_known(module)
    if reason:
        return reason
    channels = module.down_proj.shape[_channel_dims(module)["down_proj"]]
    return f"tp={tp} does not divide its {channels} channels" if channels % tp else ""


def _joined_dims(module: Any) -> dict[str, int]:
    """The dims in which gate comes before up; elsewhere their channels alternate, if it has any."""
    layout = _layout(module)
    if not layout or not (layout["has_gate"] and layout["is_concatenated"]):
        return {}
    dims, names = _channel_dims(module), ("gate_up_proj", "gate_up_proj_bias")
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return {name: dims[name] for name in names if name in own}


def _share_of_bias(bias: Tensor, tp: int) -> Tensor:
    """What each rank adds, so that the sum adds the bias once; the gradient is the whole one's."""
    value = bias.detach()
    return value / tp + (bias - value)
