"""Models whose code takes weights or activations otherwise than the ranks of tp hold them."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from dtcp.huggingface.recurrent_layers import kernel_names
from dtcp.parallelize.plans.forward_code import reads_weights

LIGER = "liger_kernel"
"""Its functions hand memory to Triton, of which a DTensor says that it begins at 0."""


def check_splittable(model: Any) -> None:
    """Refuse a model that reads a weight beside calling its module, or whose code takes memory.

    Raises:
        ValueError: naming the module.
    """
    if reads_weights(model):
        raise ValueError(
            f"Tensor parallelism gives a module its parameters where it is called, got "
            f"{type(model).__name__}, which reads the weight of one inside of it: set tp=1 and "
            f"give the ranks to cp."
        )
    for name, module in model.named_modules():
        kind, names = type(module).__name__, kernel_names(module)
        if is_parametrized(module):
            raise ValueError(
                f"Tensor parallelism splits parameters, got {name} ({kind}), of which a "
                f"parametrization makes one: set tp=1 and give the ranks to cp."
            )
        if any(each.startswith(LIGER) for each in _origins(module)):
            raise ValueError(
                f"Tensor parallelism hands DTensors to modules, got {name or kind} ({kind}) with "
                f"a kernel of Liger, which takes plain tensors: set tp=1 and give the ranks to cp, "
                f"or leave Liger out."
            )
        if {"embed_tokens", "weight", "pad_token_id"} <= names:
            raise ValueError(
                f"Tensor parallelism splits an embedding by its vocabulary, got {name} ({kind}), "
                f"which reads its weight: set tp=1 and give the ranks to cp."
            )


def _origins(module: nn.Module) -> Iterator[str]:
    """Where a module's class, its forward, and what that calls by name, were written."""
    forward = inspect.unwrap(type(module).forward)
    known = getattr(forward, "__globals__", {})
    called = (known.get(name) for name in kernel_names(module))
    for each in (type(module), forward, vars(module).get("forward"), *called):
        yield getattr(each, "__module__", None) or ""
