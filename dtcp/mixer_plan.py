"""Plans: which style for which module, by name."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from dtcp.mixer import Mixer
from dtcp.sequence.arguments import check_kind


def apply_plan(
    model: nn.Module, mesh: DeviceMesh | None, plan: Mapping[str, ParallelStyle]
) -> nn.Module:
    """Apply a plan, module name (or pattern) -> style, to the sequence's axis.

    torch's parallelize_module, and two promises more: a key that matches no module is an error,
    and so is a mixer that no key matches, which would attend to its own shard only.

    Args:
        mesh: the 1-D axis of the sequence (or the 2-D mesh of it and the heads' axis); None or
            one rank: the model runs as it is, the plan is checked all the same.
    Raises:
        ValueError: a key without a match, or an unclaimed mixer.
    """
    check_kind("apply_plan", nn.Module, model=model)
    check_kind("apply_plan", Mapping, plan=plan)
    for key, style in plan.items():
        check_kind(f"The key {key!r} of a plan", ParallelStyle, style=style)
    check_kind("apply_plan", (DeviceMesh, type(None)), mesh=mesh)
    find(model, plan)
    mixers = [name for name, module in model.named_modules() if isinstance(module, Mixer)]
    for name in mixers:
        if not any(matches(name, key) for key in plan):
            raise ValueError(
                f"Under a sharded sequence every mixer is claimed, got mixer={name!r} and the "
                f"keys {list(plan)}: add a style for it."
            )
    if mesh is not None and mesh.size() > 1:
        parallelize_module(model, mesh, dict(plan))
    return model


def find(model: nn.Module, keys: Iterable[str]) -> dict[str, nn.Module]:
    """The modules that a plan's keys name.

    Raises:
        ValueError: a key that names none.
    """
    modules = dict(model.named_modules())
    modules_named: dict[str, nn.Module] = {}
    for key in keys:
        named = {name: module for name, module in modules.items() if matches(name, key)}
        if not named:
            raise ValueError(
                f"A plan names modules of its model, got key={key!r}, which matches none of "
                f"{_some(list(modules))}: correct or remove it."
            )
        modules_named |= named
    return modules_named


def matches(name: str, key: str) -> bool:
    """Whether a plan key names a module: part by part, each part a pattern, as torch reads it."""
    parts, patterns = name.split("."), key.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _some(names: list[str]) -> str:
    shown = [name for name in names if name][:12]
    return f"{shown} and {len(names) - len(shown)} more" if len(names) > len(shown) else f"{shown}"
