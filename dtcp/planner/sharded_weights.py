"""What FSDP does with a model's parameters: units, and the bytes that each moves and holds."""

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dtcp.mixer_plan import find
from dtcp.parallelize import ParallelPlan
from dtcp.planner.setup import Precision


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together, as they are without FSDP on one rank of tp.

    Args:
        part: the block; empty for what lies outside of blocks.
        parameters: shape, dtype in compute, and whether it gets a gradient, of each.
        resharded: freed after forward and gathered again for backward.
        count: of units that are alike.
    """

    part: str
    parameters: tuple[tuple[tuple[int, ...], torch.dtype, bool], ...]
    resharded: bool
    count: int = 1

    def own(self, ranks: int, *, trained: bool = False) -> dict[torch.dtype, int]:
        """Numbers that a rank keeps, by dtype: dim 0 in equal parts, the last one padded.

        Args:
            trained: count those alone that get a gradient.
        """
        sizes: dict[torch.dtype, int] = {}
        for shape, dtype, has_grad in self.parameters:
            if trained and not has_grad:
                continue
            rows = -(-shape[0] // ranks) if shape else 1
            sizes[dtype] = sizes.get(dtype, 0) + rows * prod(shape[1:])
        return sizes

    def numbers(self, ranks: int) -> int:
        """Of all dtypes that a rank keeps."""
        return sum(self.own(ranks).values())

    def gathered(self, ranks: int) -> int:
        """Bytes of the whole unit on one rank."""
        own = self.own(ranks).items()
        return ranks * sum(numel * dtype.itemsize for dtype, numel in own)


def units_of(
    model: nn.Module,
    plan: ParallelPlan,
    precision: Precision,
    trained: Collection[int],
    *,
    reshard: bool,
) -> list[Unit]:
    """The units that `shard_parameters` makes of a model, in its order.

    Args:
        plan: keys are names of modules that are there.
        trained: ids of the parameters that get a gradient.
    """
    kept = {id(model.get_parameter(name)) for name in plan.keep_dtype}
    groups: list[tuple[str, list[nn.Module], bool]] = [
        (name, [block], reshard) for name, block in find(model, plan.blocks).items()
    ]
    for index, names in enumerate(plan.fsdp_units):
        is_last = index == len(plan.fsdp_units) - 1
        groups.append(("", list(find(model, names).values()), reshard and not is_last))
    # The root stays gathered: torch frees no root after its forward pass.
    groups.append(("", [model], False))
    units, seen = [], set[int]()
    for part, modules, resharded in groups:
        parameters = []
        for p in (p for module in modules for p in module.parameters()):
            if id(p) not in seen:
                seen.add(id(p))
                shape = p.to_local().shape if isinstance(p, DTensor) else p.shape
                wide = id(p) in kept
                dtype = precision.master if wide else precision.compute
                parameters.append((tuple(shape), dtype, id(p) in trained))
        if parameters:
            units.append(Unit(part, tuple(parameters), resharded))
    return units
