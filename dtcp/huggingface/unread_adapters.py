"""Refuses adapters and quantization of layers that are not called, only their weights read."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from dtcp.huggingface.expert_capacity import ROUTERS
from dtcp.huggingface.picking_attention import OWN_INDEXER
from dtcp.huggingface.quantized import quantized_layers
from dtcp.huggingface.recurrent_forwards import READ_BY_WEIGHT, WRITTEN_AGAIN
from dtcp.huggingface.registry import PROJECTION


@contextmanager
def noting_unread_adapters(model: nn.Module, refused: list[str]) -> Iterator[None]:
    """Inside, the model is run; adapted layers that were not, in a module that was, are refused.

    Mamba's kernels take the weight of dt_proj and of the convolution, and leave out what an adapter
    adds, on one device as well (transformers 5.23).

    Args:
        refused: gets a sentence for each.
    """
    quantized = quantized_layers(model)
    adapted = [name for name, module in model.named_modules() if _is_adapted(module)]
    layers = [*adapted, *quantized]
    called: set[str] = set()

    def note(name: str) -> Any:
        return lambda *_: called.add(name)

    with ExitStack() as hooks:
        for name in {*layers, *(_parent(name) for name in layers)}:
            hook = model.get_submodule(name).register_forward_pre_hook(note(name))
            hooks.enter_context(hook)
        yield

    def is_unread(name: str) -> bool:
        kind = type(model.get_submodule(_parent(name))).__name__
        by_weight = kind in WRITTEN_AGAIN and name.endswith(READ_BY_WEIGHT)
        return by_weight or (_parent(name) in called and name not in called)

    refused += [
        f"{name} (an adapter): {type(model.get_submodule(_parent(name))).__name__} reads the "
        f"weight of this layer and does not call it, so the adapter would have no effect: "
        f"leave it out of target_modules."
        for name in adapted
        if is_unread(name)
    ]
    refused += [
        f"{name} (quantized): this layer is not called where its module runs, which may read its "
        f"weight: leave it as it is (llm_int8_skip_modules, modules_to_not_convert)."
        for name in quantized
        if is_unread(name) or is_read_here(model, name)
    ]


def is_read_here(model: nn.Module, name: str) -> bool:
    """Whether the weight of a layer is read by code of ours that takes a module's place: of a
    router with a capacity, or of attention to tokens that an indexer picks."""
    *parts, layer = name.removesuffix(".base_layer").split(".")
    around = model.get_submodule(".".join(parts))
    picks = layer == PROJECTION and hasattr(around, OWN_INDEXER)
    return picks or OWN_INDEXER in parts or type(around).__name__ in ROUTERS


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
