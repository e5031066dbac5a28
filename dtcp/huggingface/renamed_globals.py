"""A function of somebody else's in which global names stand for something else.

The function itself, and its module, stay as they are.
"""

from collections.abc import Mapping
from functools import update_wrapper
from types import CellType, FunctionType
from typing import Any


def with_names(function: Any, names: Mapping[str, Any]) -> FunctionType:
    """A function, with all that is around it, in which global names stand for something else."""
    inside, names_of_all = getattr(function, "__wrapped__", None), function.__globals__
    closure = function.__closure__
    if inside is None:
        # Without __name__, for dynamo (2.13) would look names up in the module of that name.
        own = {key: x for key, x in names_of_all.items() if key != "__name__"}
        names_of_all = {**own, **names}
    else:
        renamed = with_names(inside, names)
        closure = tuple(CellType(renamed) if x.cell_contents is inside else x for x in closure)
    defaults = (function.__name__, function.__defaults__, closure)
    made = FunctionType(function.__code__, names_of_all, *defaults)
    update_wrapper(made, function)
    made.__kwdefaults__ = function.__kwdefaults__
    if inside is not None:
        made.__wrapped__ = renamed  # type: ignore[attr-defined]
    return made
