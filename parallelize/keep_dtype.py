"""Parameters that mixed precision leaves in the dtype they are kept in.

Under mixed precision FSDP gathers a unit's parameters in one narrower dtype, and reduces a unit's
gradients as one tensor of one dtype. What must not be rounded, for example the rates of a
recurrence or the maps between residual streams, is gathered beside the rest of its unit: by the
same hooks and at the same time, so outside of every graph, in its own dtype, and reduced in it.
"""

from collections.abc import Collection, Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from dtcp._torch.fsdp import empty_param_group_like, fsdp_param_groups
from dtcp.mixer_plan import matches

OWN_DTYPE = MixedPrecisionPolicy()


def keep_dtype_names(model: nn.Module, keys: Iterable[str]) -> tuple[str, ...]:
    """The names of the parameters that a plan's keys name.

    Raises:
        ValueError: a key that names none.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    chosen: dict[str, None] = {}
    for key in keys:
        matching = [name for name in names if matches(name, key)]
        if not matching:
            raise ValueError(
                f"keep_dtype names parameters of the model, got key={key!r}, which matches none "
                f"of the {len(names)} parameters of {type(model).__name__}: correct or remove it."
            )
        chosen |= dict.fromkeys(matching)
    return tuple(chosen)


def gather_in_own_dtype(unit: FSDPModule, parameters: Collection[nn.Parameter]) -> None:
    """Let an FSDP unit gather some of its parameters in their own dtype, beside the others.

    A unit that gathers everything in that dtype stays as it is.

    Args:
        parameters: of the whole model; those of other units are not touched.

    Traffic per rank: the parameters move in their own dtype, and the unit sends two messages
    where it sent one.
    """
    kept_ids = {id(parameter) for parameter in parameters}
    groups = fsdp_param_groups(unit) if kept_ids else ()
    for group in tuple(groups):
        kept = [p for p in group.fsdp_params if id(p.sharded_param) in kept_ids]
        rest = [p for p in group.fsdp_params if id(p.sharded_param) not in kept_ids]
        if not kept:
            continue
        param_dtype = kept[0].mp_policy.param_dtype
        gathered = {param_dtype or p.sharded_param.dtype for p in group.fsdp_params}
        if gathered == {p.sharded_param.dtype for p in kept}:
            continue
        own_group = group
        if rest:
            if isinstance(groups, tuple):
                raise NotImplementedError(
                    f"Parameters that keep their dtype are gathered in a group of their own, and "
                    f"units of this torch have one group only, got torch {torch.__version__} and "
                    f"param_dtype={param_dtype}: use torch 2.13 or newer, or no param_dtype."
                )
            group.fsdp_params = rest
            own_group = empty_param_group_like(group, OWN_DTYPE)
            # In front: a neighbour with one group prefetches only the last of ours (torch 2.13),
            # which then is the large one.
            groups.insert(0, own_group)
        own_group.fsdp_params = kept
        # FSDP reads a group's before torch 2.15, and each parameter's since.
        for each in (own_group, *kept):
            each.mp_policy = OWN_DTYPE
