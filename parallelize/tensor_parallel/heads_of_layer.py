"""A layer that runs its own forward on the heads of its rank."""

from collections.abc import Mapping
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
        enters: whether its heads read its first argument, which is the same on all ranks.
        readers: layers inside that read what is the same on all ranks.

    Traffic per rank: backward, an all-reduce of the gradient of each tensor that is so read.
    """

    dims: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    buffers: Mapping[str, tuple[Segment, ...]] = field(default_factory=dict)
    enters: bool = True
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

        def on_heads(layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
            attributes = {name: getattr(layer, name) for name in runs}
            cuts = {
                name: cut(x, runs[name], list(x.shape).index(rows[name]))
                for name, x in attributes.items()
            }
            copies = Copies(device_mesh)
            inside = {name: Reader(layer.get_submodule(name), copies) for name in readers}
            view = ModuleView(layer, {**local_parameters(layer), **own, **cuts, **inside})
            if enters and args:
                args = (copies.of(args[0]), *args[1:])
            elif enters:
                first = next(iter(kwargs))
                kwargs[first] = copies.of(kwargs[first])
            return forward.__func__(view, *args, **kwargs)

        wrap_forward(module, on_heads)
        return module


class Copies:
    """Copies of what heads read, which sum the gradients of all ranks: one of each tensor."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self._made: list[tuple[Tensor, Tensor]] = []

    def of(self, x: Tensor) -> Tensor:
        """The copy of a tensor."""
        for before, copy in self._made:
            if before is x:
                return copy
        self._made.append((x, copy_to_region(x, self._mesh)))
        return self._made[-1][1]


class Reader:
    """A layer that is handed a copy of what it reads."""

    def __init__(self, module: nn.Module, copies: Copies) -> None:
        self._module, self._copies = module, copies

    def __call__(self, x: Tensor) -> Any:
        return self._module(self._copies.of(x))

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
