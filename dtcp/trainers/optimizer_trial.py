"""Tries an optimizer on small parameters, and refuses one that steps DTensors differently.

Most optimizers are sums and products of their parameters, which DTensors carry out. One that reads
the memory of a parameter, or the shape of a gradient to make a state of it, finds those of a shard.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

SHAPES = ((66,), (96, 66), (6, 34, 32))
"""Of one dim, two and three; the matrix is no smaller than what optimizers keep in few bits."""
STEPS = 8
"""Those of RAdam and of averages change nothing at first, or what they hold every few."""
BOUND = 3e-2
"""Of what steps have added, relative to the most that they have added anywhere: Muon computes in
bf16, and what goes by a shard instead of the whole is further off, for no two shards are alike."""
OF_GROUP = ("params", "param_names", "name")
"""Entries of a group that only identify it."""
Kind = tuple[DeviceMesh, tuple[Placement, ...], int]


def check_steps_shards(optimizer: Any) -> None:
    """Refuse an optimizer that steps shards otherwise than whole weights; all ranks call it.

    It is tried as it is, with the settings of each of its groups and the optimizers that it holds,
    on parameters of its own. What fails with whole ones, too, is left to fail by itself.

    Raises:
        ValueError: on all ranks, saying what it does.
    """
    for _, kind, example in _ways(optimizer):
        said = _of_any_rank(_difference(optimizer, kind, example))
        if said:
            raise ValueError(
                f"An optimizer on a mesh steps DTensors as one process steps whole weights, got "
                f"{type(optimizer).__module__}.{type(optimizer).__name__}, {said}: take one of "
                f"torch.optim, as AdamW, or one that is made of operations of torch."
            )


def _of_any_rank(said: str) -> str:
    of_ranks = [said]
    if dist.is_initialized():
        of_ranks *= dist.get_world_size()
        dist.all_gather_object(of_ranks, said)
    return next(filter(None, of_ranks), "")


def _ways(optimizer: Any) -> Iterator[tuple[dict[str, Any], Kind, Tensor]]:
    """Groups, and kinds of parameters, that an optimizer may step differently, each once.

    Yields:
        group, kind, and the first parameter that is of both.
    """
    seen = set()
    for group in optimizer.param_groups:
        # Another rate makes no difference unless it is 0; recipes have a group for each layer.
        settings = repr(
            [
                bool(x) if isinstance(x, float) else x
                for name, x in group.items()
                if name not in OF_GROUP
            ]
        )
        for kind, example in _kinds(group["params"]).items():
            if (settings, kind) not in seen:
                seen.add((settings, kind))
                yield group, kind, example


def _kinds(parameters: list[Tensor]) -> dict[Kind, Tensor]:
    """The ways in which parameters lie on their meshes, with the first that lies so."""
    found: dict[Kind, Tensor] = {}
    for each in parameters:
        if isinstance(each, DTensor) and each.requires_grad and 0 < each.ndim <= len(SHAPES):
            placements = tuple(
                Shard(x.dim) if hasattr(x, "dim") else Replicate() for x in each.placements
            )
            found.setdefault((each.device_mesh, placements, each.ndim), each)
    return found


def _difference(optimizer: Any, kind: Kind, example: Tensor) -> str:
    """How an optimizer steps shards differently from whole parameters; empty if it does not."""
    mesh, placements, ndim = kind
    device = torch.device(mesh.device_type)  # whose parameters may lie on the host meanwhile
    first, *gradients = (x.to(device) for x in _uneven(SHAPES[ndim - 1]))

    def shards(x: Tensor) -> DTensor:
        return distribute_tensor(x.clone(), mesh, placements, src_data_rank=None)

    with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
        whole = nn.Parameter(first.clone())
        try:
            # Copies, for some optimizers make their steps of gradients in place.
            _step(optimizer, example, whole, [x.clone() for x in gradients])
        except Exception:  # noqa: BLE001  # a setting that is wrong, or parameters of another kind
            return ""
        parts = nn.Parameter(shards(first))
        try:
            _step(optimizer, example, parts, [shards(x) for x in gradients])
        except Exception as error:  # noqa: BLE001  # whatever code of others raises
            first_line = str(error).partition("\n")[0]
            return f"which fails on them ({type(error).__name__}: {first_line[:200]})"
        stepped: Any = parts.detach()
        added, gap = whole.detach() - first, stepped.full_tensor() - whole.detach()
    if not added.any() and any(x.get("lr", 1) for x in _groups_of(optimizer, example).values()):
        return f"whose method step changes nothing in {STEPS} calls"
    off = float(gap.abs().max() / added.abs().max().clamp(min=1e-30))
    return "" if off <= BOUND else f"whose steps are {off:.1e} off, relative to the largest"


def _uneven(shape: tuple[int, ...]) -> list[Tensor]:
    """A parameter and its gradients, no part of which has the others' norms."""
    generator, growing = torch.Generator().manual_seed(0), torch.ones(shape)
    for dim, size in enumerate(shape):
        growing *= torch.linspace(-2, 2, size).exp2().view(-1, *[1] * (len(shape) - dim - 1))
    first, *gradients = (torch.randn(shape, generator=generator) for _ in range(1 + STEPS))
    return [first * growing, *(x / growing for x in gradients)]


def _step(optimizer: Any, example: Tensor, parameter: nn.Parameter, gradients: list[Any]) -> None:
    """Let a copy of an optimizer step a parameter of another model in an example's place."""
    copy = _copied(optimizer, example, parameter, {})
    if callable(getattr(copy, "train", None)):  # whose weights in evaluation are others
        copy.train()
    for gradient in gradients:
        parameter.grad = gradient
        type(optimizer).step(copy)


def _groups_of(optimizer: Any, example: Tensor) -> dict[int, dict[str, Any]]:
    """The groups of a parameter by their ids, with the rates that they start from."""
    found = {}
    for group in optimizer.param_groups:
        if any(each is example for each in group["params"]):
            rate = group.get("initial_lr", group.get("lr"))
            if isinstance(rate, float | int) and rate == 0:
                rate = getattr(optimizer, "defaults", {}).get("lr")
            found[id(group)] = group if rate is None else {**group, "lr": rate}
    return found


def _copied(
    optimizer: Any, example: Tensor, parameter: nn.Parameter, copies: dict[int, Any]
) -> Any:
    """An optimizer of one parameter alone, without a state, as are those that it holds.

    Args:
        copies: of optimizers, groups and states, by the ids of what they are copies of: who holds
            an optimizer may share these with it.
    """
    if id(optimizer) in copies:
        return copies[id(optimizer)]
    copy = copies[id(optimizer)] = object.__new__(type(optimizer))

    def own(value: Any) -> Any:
        return _copied(value, example, parameter, copies) if isinstance(value, Optimizer) else value

    held = dict(_own(vars(optimizer)))
    if "state" in held:
        held["state"] = copies.setdefault(id(held["state"]), defaultdict(dict))
    if "param_groups" in held:
        held["param_groups"] = [
            copies.setdefault(key, {**settings, "params": [parameter]})
            for key, settings in _groups_of(optimizer, example).items()
        ]
    for name, value in held.items():
        if isinstance(value, dict) and name != "state":
            value.update({key: own(x) for key, x in value.items()})
        elif isinstance(value, list) or type(value) is tuple:
            value = type(value)(map(own, value))
        vars(copy)[name] = own(value)
    return copy


def _own(attributes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Attributes for a copy: no hook is called, and no list or dict of the optimizer's changes.

    A learning rate's schedule replaces the method `step` of the optimizer itself.
    """
    for name, value in attributes.items():
        if name.endswith("_hooks"):
            yield name, type(value)()
        elif name != "step":
            yield name, value.copy() if isinstance(value, dict | list | set) else value
