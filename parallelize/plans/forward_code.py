"""What the code of a module's methods does with weights and activations, read off its bytecode."""

import dis
import inspect
from collections.abc import Mapping
from itertools import pairwise
from types import FunctionType

from torch import nn

from dtcp.huggingface.recurrent_layers import kernel_names


def has_parameters(module: nn.Module) -> bool:
    """Whether a module has parameters of its own, not of modules inside of it."""
    return any(True for _ in module.parameters(recurse=False))


def reads_weights(module: nn.Module) -> bool:
    """Whether a module reads the weight of one inside of it, beside or instead of calling it.

    To know the dtype of a weight is not to compute with it.
    """
    names = kernel_names(module)
    children = (each for name, each in module.named_children() if name in names)
    inside = list(filter(has_parameters, children))
    own = {name for each in inside for name, _ in each.named_parameters(recurse=False)}
    weights = names & {"weight", *(name for name in own if not hasattr(module, name))} - {"bias"}
    if not weights:
        return False
    forward = inspect.unwrap(type(module).forward)
    read = any(
        first.argval in weights and second.argval != "dtype"
        for first, second in pairwise(dis.get_instructions(forward))
    )
    return read and bool(inside)


def reads_weights_elsewhere(module: nn.Module) -> bool:
    """Whether a method that forward does not call reads the weight of a module inside."""
    called = {"forward", "__init__", *kernel_names(module)}
    return any(name not in called for name in _methods_that_read_weights(module))


def reads_weights_in_a_method(module: nn.Module) -> bool:
    """Whether a method that forward calls reads the weight of a module inside."""
    return not _methods_that_read_weights(module).isdisjoint(kernel_names(module))


def _methods_that_read_weights(module: nn.Module) -> set[str]:
    inside = set(dict(module.named_children()))
    methods = {k: each for k, each in vars(type(module)).items() if isinstance(each, FunctionType)}
    names = {name: set(method.__code__.co_names) for name, method in methods.items()}
    return {name for name, read in names.items() if "weight" in read and read & inside}


def adds_in_place(modules: Mapping[str, nn.Module], name: str, unit: str) -> bool:
    """Whether a module around one, up to the block, changes what it is given in place."""
    block = unit.rpartition(".")[0]
    around = [other for other in modules if other and name.startswith(f"{other}.")]
    inside = [modules[other] for other in around if other == block or other.startswith(unit)]
    return any(map(_has_in_place, inside))


def _has_in_place(module: nn.Module) -> bool:
    steps = dis.get_instructions(inspect.unwrap(type(module).forward))
    adds = any(each.opname == "BINARY_OP" and each.argrepr.endswith("=") for each in steps)
    return adds or "add_" in kernel_names(module)
