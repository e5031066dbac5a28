"""Plans: which style for which module, by name."""

import warnings
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from dtcp.distributed.nodes import check_same_nodes
from dtcp.experts.losses import RouterLoss
from dtcp.mixer import Mixer
from dtcp.sequence.arguments import check_kind
from dtcp.style import MixerStyle
from dtcp.token_dropout import TokenDropout


def apply_plan(
    model: nn.Module, mesh: DeviceMesh | None, plan: Mapping[str, ParallelStyle]
) -> nn.Module:
    """Apply a plan, module name (or pattern) -> style, to the sequence's axis.

    torch's parallelize_module, and two promises more: a key that matches no module is an error,
    and so is a mixer that no key matches, which would attend to its own shard only.

    Args:
        mesh: the 1-D axis of the sequence (or the 2-D mesh of it and the heads' axis); None or
            one rank: the model runs as it is, by the kernels that the plan names; the plan is
            checked all the same.
    Raises:
        ValueError: a key without a match, an unclaimed mixer, ranks that disagree on nodes, or
            losses of routers that do not know the ranks of a batch (`parallelize` tells them).
    """
    check_kind("apply_plan", nn.Module, model=model)
    check_kind("apply_plan", Mapping, plan=plan)
    for key, style in plan.items():
        check_kind(f"The key {key!r} of a plan", ParallelStyle, style=style)
    check_kind("apply_plan", (DeviceMesh, type(None)), mesh=mesh)
    claimed = set(find(model, plan).values())
    for name, module in model.named_modules():
        if isinstance(module, Mixer) and module not in claimed:
            raise ValueError(
                f"Under a sharded sequence every mixer is claimed, got mixer={name!r} and the "
                f"keys {list(plan)}: add a style for it."
            )
    if mesh is not None and mesh.size() > 1:
        _check_router_losses(model, mesh)
        _warn_of_dropout(model)
        _warn_of_shared_scales(model)
        _check_nodes(mesh, plan.values())
        apply_styles(model, mesh, plan)
    else:
        _apply_whole(model, plan)
    return model


def apply_styles(model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, ParallelStyle]) -> None:
    """torch's parallelize_module, of names: of a pattern it warns wherever a part finds nothing.

    In a hybrid, `layers.*.mixer.conv` finds it in some layers only, and that is what it means.
    """
    for key, style in plan.items():
        names = [key] if is_name(key) else find(model, [key])
        parallelize_module(model, mesh, dict.fromkeys(names, style))


def _apply_whole(model: nn.Module, plan: Mapping[str, ParallelStyle]) -> None:
    """Let one device compute as ranks would: a kernel that is named is the same on any mesh."""
    for key, style in plan.items():
        if isinstance(style, MixerStyle):
            for mixer in find(model, [key]).values():
                style.apply_whole(mixer)


def on_nodes(plan: Mapping[str, ParallelStyle], ranks_per_node: int) -> dict[str, ParallelStyle]:
    """The plan on nodes of so many neighbours of the axis; a style that names others keeps them.

    Args:
        ranks_per_node: 0: nobody has said.
    """
    # By the style: mixers that share one still do, and its process groups with it.
    placed: dict[int, ParallelStyle] = {}
    for style in plan.values():
        if ranks_per_node and isinstance(style, MixerStyle) and not style.ranks_per_node:
            placed[id(style)] = style.on_nodes(ranks_per_node)
    return {key: placed.get(id(style), style) for key, style in plan.items()}


def find(model: nn.Module, keys: Iterable[str]) -> dict[str, nn.Module]:
    """The modules that a plan's keys name.

    Raises:
        ValueError: a key that names none.
    """
    modules = dict(model.named_modules())
    # With the other names of what several parents share.
    every = dict(model.named_modules(remove_duplicate=False))
    modules_named: dict[str, nn.Module] = {}
    for key in keys:
        names = matching(modules, key) or matching(every, key)
        named = {name: every[name] for name in names}
        if not named:
            raise ValueError(
                f"A plan names modules of its model, got key={key!r}, which matches none of "
                f"{_some(list(modules))}: correct or remove it."
            )
        modules_named |= named
    return modules_named


def matching(names: Collection[str], key: str) -> list[str]:
    """Those of the names that a plan key names, in their order.

    Args:
        names: quick to look one up in.
    """
    if is_name(key):
        return [key] if key in names else []
    return [name for name in names if matches(name, key)]


def is_name(key: str) -> bool:
    """Whether a plan key has no patterns in it."""
    return not any(letter in key for letter in "*?[")


def matches(name: str, key: str) -> bool:
    """Whether a plan key names a module: part by part, each part a pattern, as torch reads it.

    No pattern names the model itself, whose name is empty.
    """
    parts, patterns = name.split("."), key.split(".")
    return name != "" and len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _check_router_losses(model: nn.Module, mesh: DeviceMesh) -> None:
    """Refuse losses over this rank's tokens alone: those are others than one device's."""
    for name, module in model.named_modules():
        if mesh.size(0) == 1 or not isinstance(module, RouterLoss) or module.axis is not None:
            continue
        if module.balance or module.z:
            raise ValueError(
                f"A router's losses are over the tokens of all ranks, got {name!r} with "
                f"balance={module.balance}, z={module.z} and axis=None: set its axis to "
                f"ParallelMesh.loss first, as dtcp.parallelize.parallelize does."
            )


def dropout_of(module: nn.Module) -> float:
    """The rate of a module of torch's that drops at random, in training; 0 of any other."""
    if isinstance(module, TokenDropout):
        return 0.0
    return float(module.p) if isinstance(module, _DROPOUT) else 0.0


_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def _warn_of_shared_scales(model: nn.Module) -> None:
    """Say which float8 layer has a scale for all tokens that it is given: a rank gives its own."""
    for name, module in model.named_modules():
        # As torchao (0.18) says it, of the input.
        cast = getattr(getattr(module, "config", None), "cast_config_input", None)
        if getattr(getattr(cast, "scaling_granularity", None), "value", "") == "tensorwise":
            warnings.warn(
                f"A scale of all tokens of a call depends on the ranks that a row is cut for, got "
                f"{name!r} ({type(module).__name__}) with one scale per tensor: give each token "
                f"one, as torchao's recipe 'rowwise' does.",
                stacklevel=3,
            )
            return


def _warn_of_dropout(model: nn.Module) -> None:
    """Say that a model in training will not be what it is on one device."""
    for name, module in model.named_modules():
        if module.training and dropout_of(module):
            warnings.warn(
                f"What dropout drops depends on the ranks that a row is cut for (of ranks that are "
                f"seeded alike, the same places of each shard), got {name!r} with "
                f"p={dropout_of(module)}: use dtcp.TokenDropout, which drops by token, or set it "
                f"to 0, for results that no mesh changes.",
                stacklevel=3,
            )
            return


def _check_nodes(mesh: DeviceMesh, styles: Iterable[ParallelStyle]) -> None:
    """Refuse plans of ranks that disagree on nodes, on all ranks alike."""
    said = {style.ranks_per_node for style in styles if isinstance(style, MixerStyle)}
    for number in (max(said, default=0), min(said, default=0)):
        check_same_nodes(number, mesh.device_type, mesh.get_group(0))


def _some(names: list[str]) -> str:
    shown = [name for name in names if name][:12]
    return f"{shown} and {len(names) - len(shown)} more" if len(names) > len(shown) else f"{shown}"
