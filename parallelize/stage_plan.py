"""A plan of a whole model, for the part of it that a pipeline stage holds."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.huggingface.install import has_mixers
from dtcp.huggingface.stages import HFStage, StandIn, keep_stage
from dtcp.mixer_plan import find, matching
from dtcp.parallelize.apply import ParallelPlan


def plan_of_stage(plan: ParallelPlan, stage: nn.Module) -> ParallelPlan:
    """What a plan says of the modules that a stage has, by the names of the whole model.

    Args:
        plan: whose keys each name something of the whole; a stage lacks what others hold.
    """
    stands_in = {name: isinstance(x, StandIn) for name, x in stage.named_modules()}
    modules = {name for name, of_another in stands_in.items() if not of_another}
    parameters = {name for name, _ in stage.named_parameters()}

    def own(key: str) -> list[str]:
        """The key, if it names something here; the names, if it names stand-ins as well."""
        names = matching(modules, key)
        return [key] if names and len(names) == len(matching(stands_in, key)) else names

    def styles(of_axis: Mapping[str, ParallelStyle]) -> dict[str, ParallelStyle]:
        return {name: style for key, style in of_axis.items() for name in own(key)}

    units = (tuple(name for key in unit for name in own(key)) for unit in plan.fsdp_units)
    return replace(
        plan,
        tp=styles(plan.tp),
        cp=styles(plan.cp),
        ep=styles(plan.ep),
        blocks=tuple(name for key in plan.blocks for name in own(key)),
        fsdp_units=tuple(unit for unit in units if unit),
        keep_dtype=tuple(key for key in plan.keep_dtype if matching(parameters, key)),
    )


def plan_of_hf_stage(plan: ParallelPlan, model: nn.Module, stage: HFStage) -> ParallelPlan:
    """Leave a stage of a model of transformers in it, and of its plan what is for that.

    Raises:
        ValueError: adapters around the model, or blocks that are not the layers of its cut.
    """
    if not has_mixers(model):
        raise ValueError(
            f"Stages are of a model by itself, got a {type(model).__name__} around one: train "
            f"adapters without an axis pp."
        )
    cut, blocks = stage.cut, find(model, plan.blocks)
    if list(blocks) != [f"{cut.layers}.{number}" for number in range(cut.count)]:
        raise ValueError(
            f"A model of transformers is cut between its blocks, got {len(blocks)} in "
            f"{plan.blocks} of a {type(model).__name__}, and a stage of {cut.count} layers in "
            f"{cut.layers}: take stage_cut of this model, or train it without an axis pp."
        )
    keep_stage(model, stage)
    return plan_of_stage(plan, model)
