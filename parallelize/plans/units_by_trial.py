"""Parts of blocks that no plan splits, tried one by one: a part is split if all of it is."""

from collections.abc import Iterable, Mapping, Sequence

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
    whole: Iterable[str],
    tp: int,
) -> Styles:
    """Styles of the modules in parts of blocks that are whole, by name, where tp splits them.

    Args:
        owners: modules that have parameters.
        whole: names of the parts to try.
    """
    rotary = rotary_widths(model)
    tried: dict[tuple[object, ...], Styles] = {}
    styles: Styles = {}
    for unit in whole:
        module = modules.get(unit)
        if module is None or not _is_tried(module):
            continue
        form = form_of(module)
        if form not in tried:
            tried[form] = styles_by_trial(module, tp, rotary, heads=calls_registry(module))
        of_unit = {f"{unit}.{name}".rstrip("."): style for name, style in tried[form].items()}
        parts = {adapted(name)[0] for name in owners if f"{name}.".startswith(f"{unit}.")}
        styles |= of_unit if parts <= of_unit.keys() else {}
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


def _is_tried(module: nn.Module) -> bool:
    """Whether a module attends itself or is without attention, and has no latents."""
    inside = any(calls_registry(each) for each in module.modules() if each is not module)
    return not inside and not makes_keys_of_latents(module)
