"""Adapters of peft that have no effect: their layer is not called, only its weight is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dtcp.huggingface.recurrent_forwards import READ_BY_WEIGHT, WRITTEN_AGAIN


@contextmanager
def noting_unread_adapters(model: nn.Module, refused: list[str]) -> Iterator[None]:
    """Inside, the model is run; adapted layers that were not, in a module that was, are refused.

    Mamba's kernels take the weight of dt_proj and of the convolution, and leave out what an adapter
    adds, on one device as well (transformers 5.23).

    Args:
        refused: gets a sentence for each.
    """
    layers = [name for name, module in model.named_modules() if _is_adapted(module)]
    called: set[str] = set()

    def note(name: str) -> Any:
        return lambda *_: called.add(name)

    watched = {*layers, *(_parent(name) for name in layers)}
    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in watched]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

    def is_unread(name: str) -> bool:
        kind = type(model.get_submodule(_parent(name))).__name__
        by_weight = kind in WRITTEN_AGAIN and name.endswith(READ_BY_WEIGHT)
        return by_weight or (_parent(name) in called and name not in called)

    refused += [
        f"{name} (an adapter): {type(model.get_submodule(_parent(name))).__name__} reads the "
        f"weight of this layer and does not call it, so the adapter would have no effect: "
        f"leave it out of target_modules."
        for name in layers
        if is_unread(name)
    ]


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
