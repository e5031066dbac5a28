"""Parts of blocks that no plan splits, tried one by one: a part is split if all of it is.

Layers that widen and narrow in parts of their own (fc1 and fc2) are tried together, in the module
around them.
"""

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from dtcp.huggingface.latents import makes_keys_of_latents
from dtcp.parallelize.plans.adapters import adapted
from dtcp.parallelize.plans.dummy_calls import rotary_widths
from dtcp.parallelize.plans.heads_by_trial import Styles, styles_by_trial
from dtcp.parallelize.plans.stand_in_run import calls_registry, form_of


def units_by_trial(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    owners: Sequence[str],
    missing: Collection[str],
    beside: Collection[str],
    tp: int,
) -> Styles:
    """Styles of the modules in parts of blocks that are whole, by name, where tp splits them.

    Args:
        owners: modules that have parameters.
        missing: names of the parts to try, alone and with the others in a module.
        beside: of parts to try alone.
    """
    rotary = rotary_widths(model)
    tried: dict[tuple[object, ...], Styles] = {}

    def styles_of(around: str, units: Sequence[str]) -> Styles:
        module = modules[around]
        names = tuple(unit[len(around) :].lstrip(".") for unit in units)
        form = (*form_of(module), *names)
        if form not in tried:
            tried[form] = styles_by_trial(module, tp, rotary, names)
        styles = {f"{around}.{name}".rstrip("."): style for name, style in tried[form].items()}
        starts = tuple(f"{unit}." for unit in units)
        parts = {adapted(name)[0] for name in owners if f"{name}.".startswith(starts)}
        return styles if parts <= styles.keys() else {}

    styles: Styles = {}
    by_module: dict[str, list[str]] = {}
    for unit in dict.fromkeys((*missing, *beside)):
        module = modules.get(unit)
        if module is None or any(map(makes_keys_of_latents, module.modules())):
            continue
        of_unit = styles_of(unit, [unit])
        styles |= of_unit
        attends = any(map(calls_registry, module.modules()))
        if not of_unit and not attends and unit not in beside:
            by_module.setdefault(unit.rpartition(".")[0], []).append(unit)
    for around, units in by_module.items():
        styles |= styles_of(around, units) if around and len(units) > 1 else {}
    return styles


def beside_experts(
    modules: Mapping[str, nn.Module], roles: Mapping[str, str], experts: str
) -> list[str]:
    """Names of modules beside experts of which a plan says nothing: shared experts are among them.

    Args:
        experts: the role of experts.
    """
    moes = {name.rpartition(".")[0] for name in modules if roles[name] == experts}
    known = [name for name in modules if roles[name]]
    beside = (name for name in modules if name.rpartition(".")[0] in moes)
    return [name for name in beside if not any(f"{each}.".startswith(f"{name}.") for each in known)]
