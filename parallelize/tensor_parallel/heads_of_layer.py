"""A layer that runs its own forward on the heads of its rank."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.forward import wrap_forward
from dtcp.parallelize.tensor_parallel.distribute import distribute_parameter
from dtcp.parallelize.tensor_parallel.local_params import LocalParams, ModuleView, local_parameters
from dtcp.parallelize.tensor_parallel.regions import copy_to_region, reduce_from_region
from dtcp.parallelize.tensor_parallel.segments import Segment, cut, rows_of_heads


@dataclass
class HeadsOfLayer(ParallelStyle):
    """Run a layer as it is, with the parameters and the sizes that its heads on this rank have.

    Args:
        dims: in which the layer's own parameters are split, by name.
        sizes: what the layer reads of itself, by name, for the heads of one rank; of its config,
            with "config." before the name.
        buffers: the parts of what is no parameter and is cut as such, by name, in the first dim
            that has as many rows.
        enters: the arguments that its heads read, each the same on all ranks, with their places;
            True: the first one. Else it comes from a layer around it that this style has.
        readers: layers inside that copy what they read, where the layer reads it beside its heads.

    Traffic per rank: backward, an all-reduce of the gradient of each input that enters.
    """

    dims: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    buffers: Mapping[str, tuple[Segment, ...]] = field(default_factory=dict)
    enters: bool | Mapping[str, int] = True
    readers: tuple[str, ...] = ()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, _ in list(module.named_parameters(recurse=False)):
            distribute_parameter(module, name, device_mesh, Shard(self.dims[name]))
        tp, rank = device_mesh.size(), device_mesh.get_local_rank()
        runs = {name: rows_of_heads(parts, tp, rank) for name, parts in self.buffers.items()}
        rows = {name: sum(each.rows for each in parts) for name, parts in self.buffers.items()}
        sizes, enters, readers = dict(self.sizes), self.enters, self.readers
        own: dict[str, Any] = {n: x for n, x in sizes.items() if not n.startswith(CONFIG)}
        if of_config(sizes):
            own["config"] = ChangedConfig(module.config, of_config(sizes))

        def read(x: Tensor) -> Tensor:
            return copy_to_region(x, device_mesh)

        def on_heads(layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
            attributes = {name: getattr(layer, name) for name in runs}
            cuts = {
                name: cut(x, runs[name], list(x.shape).index(rows[name]))
                for name, x in attributes.items()
            }
            inside = {name: Reader(layer.get_submodule(name), read) for name in readers}
            view = ModuleView(layer, {**local_parameters(layer), **own, **cuts, **inside})
            args, kwargs = _entered(enters, args, kwargs, read)
            return forward.__func__(view, *args, **kwargs)

        wrap_forward(module, on_heads)
        return module


Read = Callable[[Tensor], Tensor]


def _entered(
    enters: bool | Mapping[str, int], args: tuple[Any, ...], kwargs: dict[str, Any], read: Read
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer, with what its heads read copied, and the same tensor once."""
    if enters is True:
        enters = {next(iter(kwargs), ""): 0} if not args else {"": 0}
    copied: list[tuple[Tensor, Tensor]] = []

    def once(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        for before, copy in copied:
            if before is x:
                return copy
        copied.append((x, read(x)))
        return copied[-1][1]

    for name, place in (enters or {}).items():
        if place < len(args):
            args = (*args[:place], once(args[place]), *args[place + 1 :])
        elif name in kwargs:
            kwargs = {**kwargs, name: once(kwargs[name])}
    return args, kwargs


class Reader:
    """A layer that is handed a copy of what it reads, which sums the gradients of all ranks."""

    def __init__(self, module: nn.Module, read: Read) -> None:
        self._module, self._read = module, read

    def __call__(self, x: Tensor) -> Any:
        return self._module(self._read(x))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


CONFIG = "config."


def of_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of values by name, those of a config."""
    return {name.removeprefix(CONFIG): x for name, x in values.items() if name.startswith(CONFIG)}


class ChangedConfig:
    """A config, but for some of its fields."""

    def __init__(self, config: Any, values: Mapping[str, Any]) -> None:
        self._config, self._values = config, values

    def __getattr__(self, name: str) -> Any:
        return self._values[name] if name in self._values else getattr(self._config, name)


@dataclass
class SumForHeads(LocalParams):
    """Sum what the ranks' channels give, for each of them to go on with its heads: no bias.

    Traffic per rank: an all-reduce of the output, and one of its gradient.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        super()._apply(module, device_mesh)

        def summed(_: nn.Module, forward: Any, x: Tensor) -> Tensor:
            return copy_to_region(reduce_from_region(forward(x), device_mesh), device_mesh)

        wrap_forward(module, summed)
        return module


WHOLE_FOR_HEADS = LocalParams(Replicate(), partial=True)
"""The style of what is whole on each rank and computes on its heads, or for them alone."""
