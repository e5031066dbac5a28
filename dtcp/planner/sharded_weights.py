"""How FSDP shards a model's parameters: its units, and the bytes that each moves and holds."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from math import prod

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dtcp.distributed.mesh import Degrees
from dtcp.mixer_plan import find
from dtcp.parallelize import ParallelPlan
from dtcp.planner.setup import Precision


@dataclass(frozen=True)
class Weight:
    """A parameter of a rank, as it is without FSDP.

    Args:
        dtype: in compute.
        trained: it gets a gradient.
        spread: its first dim is that of experts, of which each rank of ep has its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool
    spread: bool = False

    def own(self, degrees: Degrees) -> int:
        """Elements that FSDP leaves each rank: dim 0 in equal parts, the last one padded.

        Of experts, the next dim, where they are too few for their ranks and it can be divided.
        """
        ranks = sharding_ranks(degrees, spread=self.spread)
        if not self.shape:
            return 1
        if self.spread and self.shape[0] % ranks and self.shape[1:2] and not self.shape[1] % ranks:
            return prod(self.shape) // ranks
        return -(-self.shape[0] // ranks) * prod(self.shape[1:])


def sharding_ranks(degrees: Degrees, *, spread: bool) -> int:
    """Ranks that FSDP shards a weight over: fsdp, or edp_shard of one that is spread over ep."""
    if spread:
        return degrees.sparse // degrees.ep // degrees.etp
    return degrees.dp_shard * degrees.cp


class UnitRole(Enum):
    """When a unit is used: with its block, before all blocks, after them, or all the time."""

    BLOCK = "block"
    FIRST = "first"
    LAST = "last"
    ROOT = "root"


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together.

    Args:
        part: the block; empty for what lies outside of blocks.
        role: of what lies outside: the last unit that a plan names is used after the blocks.
        resharded: freed after forward and gathered again for backward.
        count: of units that are alike.
    """

    part: str
    weights: tuple[Weight, ...]
    resharded: bool
    count: int = 1
    role: UnitRole = UnitRole.BLOCK

    def numbers(self, degrees: Degrees) -> int:
        """Elements that a rank keeps, of all dtypes."""
        return sum(weight.own(degrees) for weight in self.weights)

    def kept(self, degrees: Degrees, *, spread: bool) -> int:
        """Bytes of a rank's own shards as they are gathered, of either kind of weight."""
        weights = _of_kind(self.weights, spread=spread)
        return sum(weight.own(degrees) * weight.dtype.itemsize for weight in weights)

    def summed(self, degrees: Degrees, precision: Precision, *, spread: bool) -> int:
        """Bytes of a rank's own gradients as they are summed, of either kind of weight."""
        total = 0
        for weight in _of_kind(self.weights, spread=spread):
            # What is kept in its own dtype is summed in it, too.
            narrow = weight.dtype == precision.compute
            width = precision.reduce if narrow else weight.dtype
            total += weight.trained * weight.own(degrees) * width.itemsize
        return total


def _of_kind(weights: Iterable[Weight], *, spread: bool) -> list[Weight]:
    return [weight for weight in weights if weight.spread is spread]


def units_of(
    model: nn.Module,
    plan: ParallelPlan,
    precision: Precision,
    trained: Collection[int],
    *,
    experts: DeviceMesh | None,
    reshard: bool,
) -> list[Unit]:
    """The units that `shard_parameters` makes of a model, in its order.

    Args:
        plan: keys are names of modules that are there.
        trained: ids of the parameters that get a gradient.
        experts: the axes that weights of experts are spread over.
    """
    kept = {id(model.get_parameter(name)) for name in plan.keep_dtype}
    units, seen = [], set[int]()
    for part, role, modules in modules_of_units(model, plan):
        # The root stays gathered: torch frees no root after its forward pass.
        resharded = reshard and role in (UnitRole.BLOCK, UnitRole.FIRST)
        weights = []
        for p in (p for module in modules for p in module.parameters()):
            if id(p) not in seen:
                seen.add(id(p))
                dtype = precision.master if id(p) in kept else precision.compute
                weights.append(_weight(p, dtype, trained=id(p) in trained, experts=experts))
        if weights:
            units.append(Unit(part, tuple(weights), resharded, role=role))
    return units


def modules_of_units(
    model: nn.Module, plan: ParallelPlan
) -> list[tuple[str, UnitRole, list[nn.Module]]]:
    """(block, role, modules) of each unit, in the order in which units are made.

    A parameter belongs to the first unit that has it.
    """
    blocks = find(model, plan.blocks)
    inner = [
        names
        for names in plan.fsdp_units
        if any(name.startswith(f"{block}.") for block in blocks for name in names)
    ]
    # Parts that blocks share.
    groups = [("", UnitRole.FIRST, list(find(model, names).values())) for names in inner]
    groups += [(name, UnitRole.BLOCK, [block]) for name, block in blocks.items()]
    outer = [names for names in plan.fsdp_units if names not in inner]
    for index, names in enumerate(outer):
        is_last = index == len(outer) - 1
        role = UnitRole.LAST if is_last else UnitRole.FIRST
        groups.append(("", role, list(find(model, names).values())))
    return [*groups, ("", UnitRole.ROOT, [model])]


def _weight(
    p: nn.Parameter, dtype: torch.dtype, *, trained: bool, experts: DeviceMesh | None
) -> Weight:
    spread = experts is not None and isinstance(p, DTensor) and p.device_mesh == experts
    shape = p.to_local().shape if isinstance(p, DTensor) else p.shape
    return Weight(tuple(shape), dtype, trained, spread)
