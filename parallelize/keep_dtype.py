"""Islands: parameters that are computed with in the dtype they are kept in.

Under mixed precision FSDP gathers a unit's parameters in one narrower dtype, and a unit's
gradients are reduced as one tensor of one dtype. What must not be rounded, as the rates of a
recurrence or the maps between residual streams, is gathered beside the rest of its unit: by the
same hooks and at the same time, so outside of every graph, in its own dtype, and reduced in it.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from dtcp._torch import empty_param_group_like, fsdp_param_groups
from dtcp.plan import matches

OWN_DTYPE = MixedPrecisionPolicy()


def find_islands(model: nn.Module, keys: Iterable[str]) -> tuple[str, ...]:
    """The names of the parameters that a plan's keys name.

    Raises:
        ValueError: a key that names none.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found: dict[str, None] = {}
    for key in keys:
        named = [name for name in names if matches(name, key)]
        if not named:
            raise ValueError(
                f"An island is a parameter of its model, got key={key!r} in the plan's islands, "
                f"which matches none of the {len(names)} parameters of "
                f"{type(model).__name__}: correct or remove it."
            )
        found |= dict.fromkeys(named)
    return tuple(found)


def keep_apart(unit: FSDPModule, islands: Collection[nn.Parameter]) -> None:
    """Let a unit gather its islands in their own dtype, beside its other parameters.

    A unit that gathers everything in that dtype stays as it is.

    Traffic per rank: what the unit's gathers and reductions were, in two messages rather than
    one, and for an island in its own dtype.
    """
    mine = {id(parameter) for parameter in islands}
    groups = _groups(unit) if mine else []
    for group in list(groups):
        kept = [p for p in group.fsdp_params if id(p.sharded_param) in mine]
        rest = [p for p in group.fsdp_params if id(p.sharded_param) not in mine]
        asked = group.mp_policy.param_dtype
        gathered = {asked or p.sharded_param.dtype for p in group.fsdp_params}
        if not kept or gathered == {p.sharded_param.dtype for p in kept}:
            continue
        apart = group
        if rest:
            group.fsdp_params = rest
            apart = empty_param_group_like(group)
            # In front: a neighbour of one group prefetches the last of ours alone (torch 2.13),
            # which then is the large one.
            groups.insert(0, apart)
        apart.fsdp_params, apart.mp_policy = kept, OWN_DTYPE


def _groups(unit: FSDPModule) -> list[Any]:
    """The groups of parameters that a unit communicates.

    torch 2.13 has them as a list, for experts on a mesh of their own; it has no public way to
    them, nor to a dtype for each. All that follows from a group's dtypes is worked out at the
    first step.
    """
    groups = fsdp_param_groups(unit)
    if groups is None:
        raise NotImplementedError(
            f"Islands are gathered in a group of their own, and units of this torch have one "
            f"group only, got torch {torch.__version__}: use torch 2.13, or no param_dtype."
        )
    return groups
