"""A module that computes on plain tensors: the local parts of its own parameters."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp._torch.modules import parameters_replaced
from dtcp.forward import wrap_forward
from dtcp.huggingface.quantized import is_quantized_layer
from dtcp.parallelize.tensor_parallel.distribute import distribute_parameter


@dataclass
class LocalParams(ParallelStyle):
    """Run a module as it is, on plain tensors, with this rank's part of its own parameters.

    For modules that DTensor's rules do not suit: many small operations, several outputs. Inputs
    are the same on every rank, and so is the gradient of a replicated parameter.

    Args:
        placement: of every parameter: Replicate(), or Shard(dim) where each rank computes
            outputs of its own, those of its heads for example.
        partial: each rank has a part of the gradient of a replicated parameter, for it computes
            on its heads, or for them alone.
    """

    placement: Placement = field(default_factory=Replicate)
    partial: bool = field(default=False, kw_only=True)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if is_quantized_layer(module):
            return module  # Whole and frozen: it runs as it is.
        for name, _ in list(module.named_parameters(recurse=False)):
            distribute_parameter(module, name, device_mesh, self.placement)
        if self.partial:
            keep_local_form(module, _whole_of_parts)
        return self.run_on_local(module)

    def run_on_local(self, module: nn.Module) -> nn.Module:
        """Let a module whose parameters are distributed run on their local form."""

        def on_local(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
            # What the module ran before: that of its class, or one that a survey has changed.
            view = ModuleView(module, local_parameters(module))
            return forward.__func__(view, *args, **kwargs)

        def on_itself(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
            with parameters_replaced(module, local_parameters(module)):
                return forward(*args, **kwargs)

        wrap_forward(module, on_itself if reads_its_class(type(module).forward) else on_local)
        return module


def reads_its_class(forward: Any) -> bool:
    """Whether a forward takes nothing but an instance of its class for its self.

    One that calls the forward of a base class does, and one in a wrapper of transformers that looks
    whether it is the class's outermost, or which outputs the class records.
    """
    inside = getattr(inspect.unwrap(forward), "__code__", None)
    around = getattr(forward, "__code__", None)
    calls_base = inside is not None and "__class__" in inside.co_freevars
    if around is None or around is inside:
        return calls_base
    return calls_base or not {"gradient_checkpointing", "_active_collector"}.isdisjoint(
        around.co_names
    )


class ModuleView:
    """What a module's forward takes for its self: the module, with other tensors as parameters."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, Any]) -> None:
        self._module, self._tensors = module, tensors
        self._inside: dict[str, ModuleView] = {}

    def forward_of_type(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the module's class on it."""
        return type(self._module).forward(cast(nn.Module, self), *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module itself, which has a style of its own."""
        return self._module(*args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        """The modules inside, as those of nn.Sequential."""
        return (getattr(self, name) for name, _ in self._module.named_children())

    def __getattr__(self, name: str) -> Any:
        if name in self._tensors:
            return self._tensors[name]
        value = getattr(self._module, name)
        if isinstance(value, MethodType) and value.__self__ is self._module:
            return partial(value.__func__, self)
        if isinstance(value, nn.Module) and _is_distributed(value):
            # A layer may read the weight of a module inside of it, a convolution's for example.
            if name not in self._inside:
                self._inside[name] = _LazyView(value, {})
            return self._inside[name]
        return value


class _LazyView(ModuleView):
    """The view of a module inside: some call it and never read its weights, which may cost."""

    def __getattr__(self, name: str) -> Any:
        is_new = name not in self._tensors
        if is_new and isinstance(getattr(self._module, name), nn.Parameter):
            self._tensors = {**self._tensors, name: _local(self._module, name)}
        return super().__getattr__(name)


def _is_distributed(module: nn.Module) -> bool:
    return any(isinstance(x, DTensor) for x in module.parameters(recurse=False))


def local_parameters(module: nn.Module) -> dict[str, Tensor]:
    """What this rank computes with of a module's own parameters: their local parts, or a form."""
    return {name: _local(module, name) for name, _ in module.named_parameters(recurse=False)}


LocalForm = Callable[[DTensor], Tensor]
_FORM = "dtcp_local_form"


def keep_local_form(module: nn.Module, form: LocalForm) -> None:
    """Let a module compute with a form of its parameters, and not with their local parts."""
    vars(module)[_FORM] = form


def _local(module: nn.Module, name: str) -> Tensor:
    form: LocalForm = vars(module).get(_FORM, _own_part)
    return form(cast(DTensor, module.get_parameter(name)))


def _own_part(x: DTensor) -> Tensor:
    return x.to_local(grad_placements=x.placements)


def _whole_of_parts(x: DTensor) -> Tensor:
    return x.to_local(grad_placements=[Partial()])
