"""Parameters that two modules share, kept shared while styles replace them."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

TiedParameters = tuple[tuple[str, ...], ...]
"""The names of each parameter that has several."""


def find_tied_parameters(model: nn.Module) -> TiedParameters:
    """Names of every parameter that has more than one."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def check_tied_parameters(tied: TiedParameters, fsdp_units: Sequence[Sequence[str]]) -> None:
    """Refuse to gather a shared parameter in two places: each would free it under the other.

    Args:
        fsdp_units: names of the modules that are gathered together; the rest is one unit more. Of a
            module in another, the inner one's unit gathers its parameters.
    Raises:
        ValueError: a parameter with names in two units.
    """
    for names in tied:
        if len({_unit_of(name, fsdp_units) for name in names}) > 1:
            raise ValueError(
                f"A shared parameter is gathered in one place, got {names} in several of the "
                f"plan's blocks and fsdp_units: put the modules into one unit, or leave them out."
            )


def restore_tied_parameters(model: nn.Module, tied: TiedParameters) -> None:
    """Share again what styles, which replace parameters, have separated.

    Raises:
        ValueError: the styles have placed the two in different ways.
    """
    for first, *others in tied:
        parameter = model.get_parameter(first)
        for other in others:
            separated = model.get_parameter(other)
            if _placements(separated) != _placements(parameter):
                raise ValueError(
                    f"Styles place a shared parameter alike, got {first} placed as "
                    f"{_placements(parameter)} and {other} as {_placements(separated)}: change a "
                    f"style in the plan, or untie them."
                )
            module, _, name = other.rpartition(".")
            model.get_submodule(module).register_parameter(name, parameter)


def units_across_blocks(tied: TiedParameters, blocks: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Modules that blocks share parameters of, by name: those of one unit are gathered together.

        blocks 3 and 9 share their part `attention`     ("layers.3.attention", "layers.9.attention")

    A part is a child of its block. What is shared otherwise is left to check_tied_parameters.
    """
    units: dict[tuple[str, ...], None] = {}
    for names in tied:
        parts = [_part_of_block(name, blocks) for name in names]
        if None not in parts and len(set(parts)) > 1:
            units[tuple(sorted(f"{part}" for part in set(parts)))] = None
    return tuple(units)


def _part_of_block(parameter: str, blocks: Sequence[str]) -> str | None:
    """The child of a block that holds a parameter; None if none does."""
    for block in blocks:
        child, dot, _ = parameter.removeprefix(f"{block}.").partition(".")
        if parameter.startswith(f"{block}.") and dot:
            return f"{block}.{child}"
    return None


def _unit_of(parameter: str, fsdp_units: Sequence[Sequence[str]]) -> int:
    around = [
        (len(module), index)
        for index, modules in enumerate(fsdp_units)
        for module in modules
        if parameter.startswith(f"{module}.")
    ]
    return max(around, default=(0, len(fsdp_units)))[1]


def _placements(parameter: Tensor) -> object:
    return parameter.placements if isinstance(parameter, DTensor) else "not distributed"
