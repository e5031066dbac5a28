"""A plan of a whole model, for the part of it that a pipeline stage holds."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.mixer_plan import matching
from dtcp.parallelize.apply import ParallelPlan


def plan_of_stage(plan: ParallelPlan, stage: nn.Module) -> ParallelPlan:
    """What a plan says of the modules that a stage has, by the names of the whole model.

    Args:
        plan: whose keys each name something of the whole; a stage lacks what others hold.
    """
    modules = {name for name, _ in stage.named_modules()}
    parameters = {name for name, _ in stage.named_parameters()}

    def styles(of_axis: Mapping[str, ParallelStyle]) -> dict[str, ParallelStyle]:
        return {key: style for key, style in of_axis.items() if matching(modules, key)}

    units = (tuple(key for key in unit if matching(modules, key)) for unit in plan.fsdp_units)
    return replace(
        plan,
        tp=styles(plan.tp),
        cp=styles(plan.cp),
        ep=styles(plan.ep),
        blocks=tuple(key for key in plan.blocks if matching(modules, key)),
        fsdp_units=tuple(unit for unit in units if unit),
        keep_dtype=tuple(key for key in plan.keep_dtype if matching(parameters, key)),
    )
