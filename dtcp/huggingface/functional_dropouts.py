"""Dropout that a model's own code calls as a function: `nn.functional.dropout(x, p=self.dropout)`.

The rate is a number that the module keeps. With a module in its place, and a forward in which
`dropout` calls it, the function is a module like any other. That forward is the module's own, with
other global names; one for all modules of a class, so that they share their graphs.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from dtcp.forward import INSIDE
from dtcp.huggingface.renamed_globals import with_names

Dropout = Callable[..., Tensor]


class Rate(float):
    """A number that a module keeps and may drop by, which knows its name."""

    name: str


def rates_of(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """What modules may drop by in their own forward: by name, the module and its attribute."""
    return {
        f"{name}.{key}".lstrip("."): (module, key)
        for name, module in model.named_modules()
        for key, rate in vars(module).items()
        if type(rate) is float and rate > 0 and "drop" in key
        if "forward" not in vars(module) and _reads_dropout(type(module).forward)
    }


@contextmanager
def noting_rates(model: nn.Module, note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, modules that drop by a number of theirs in training note it, and drop nothing."""

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not isinstance(p, Rate):
            return functional.dropout(x, p, training, inplace)
        if training:
            note(p.name, x)
        return x

    rates, forwards = rates_of(model), Forwards(dropout)
    for name, (module, key) in rates.items():
        rate = Rate(vars(module)[key])
        rate.name, vars(module)[key] = name, rate
        module.forward = forwards.of(module)
    try:
        yield
    finally:
        for module, key in rates.values():
            vars(module)[key] = float(vars(module)[key])
            vars(module).pop("forward", None)


def install_rates(model: nn.Module, names: Iterable[str]) -> None:
    """Put dropout modules in the place of numbers that modules drop by."""
    forwards = Forwards(_called)
    for name in names:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        if key in vars(module):  # not yet, by another of its names
            dropped = nn.Dropout(vars(module).pop(key)).train(module.training)
            module.add_module(key, dropped)
        # What is around its forward by now goes on to call it.
        vars(module)[INSIDE if INSIDE in vars(module) else "forward"] = forwards.of(module)


def _called(x: Tensor, p: Any = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """torch's dropout; of a module in the place of a rate, what the module makes of x."""
    if not isinstance(p, nn.Module):
        return functional.dropout(x, p, training, inplace)
    dropped: Tensor = p(x) if training else x
    return dropped


class Forwards:
    """The forwards of modules' classes, with another function for torch's dropout."""

    def __init__(self, dropout: Dropout) -> None:
        self.functional = _with(functional, dropout=dropout)
        self.nn = _with(nn, functional=self.functional)
        self.made: dict[type, FunctionType] = {}

    def of(self, module: nn.Module) -> MethodType:
        """That of a module."""
        kind = type(module)
        if kind not in self.made:
            self.made[kind] = with_names(kind.forward, self._names(kind.forward))
        return MethodType(self.made[kind], module)

    def _names(self, function: Any) -> dict[str, Any]:
        known = inspect.unwrap(function).__globals__
        names = {key: self.nn for key, x in known.items() if x is nn}
        names |= {key: self.functional for key, x in known.items() if x is functional}
        return names | {key: with_names(x, names) for key, x in _helpers(known).items()}


def _with(module: ModuleType, **change: Any) -> ModuleType:
    """A module in which some names stand for something else."""
    made = ModuleType(module.__name__)
    vars(made).update({**vars(module), **change})
    return made


def _reads_dropout(function: Any) -> bool:
    """Whether a function calls torch's dropout, or a function of its file that does."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return False
    helpers = _helpers(inspect.unwrap(function).__globals__)
    return _names_dropout(code) or not helpers.keys().isdisjoint(code.co_names)


def _helpers(known: Mapping[str, Any]) -> dict[str, FunctionType]:
    """Functions of a file that call torch's dropout."""
    return {
        key: x
        for key, x in known.items()
        if isinstance(x, FunctionType) and x.__globals__ is known and _names_dropout(x.__code__)
    }


def _names_dropout(code: CodeType) -> bool:
    return "dropout" in code.co_names and not {"functional", "F"}.isdisjoint(code.co_names)
