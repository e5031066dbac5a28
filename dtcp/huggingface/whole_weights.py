"""Refuses methods of transformers that read or replace whole weights: a rank has shards.

save_pretrained fails inside torch on the rank that writes, and the others go on as if all were
well; resize_token_embeddings puts plain weights beside sharded ones.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

ON_EVERY_RANK = "call dtcp.parallelize.save_hf(model, folder) on every rank"
REMEDIES: Mapping[str, str] = {
    "save_pretrained": ON_EVERY_RANK,
    "push_to_hub": f"{ON_EVERY_RANK}, and upload the folder",
    "resize_token_embeddings": "call it before parallelize_hf",
}


def refuse_whole_weights(model: nn.Module) -> None:
    """Make a model refuse these methods from now on, as far as it has them.

    A call that brings its own whole weights (`state_dict=`) is let through.
    """
    for name, remedy in REMEDIES.items():
        if hasattr(type(model), name):
            setattr(model, name, MethodType(_refusing(name, remedy), model))


def refuse_merging(model: Any) -> None:
    """Make a PeftModel refuse to merge its adapters, of which ranks have shards, into quantized
    weights, which they have whole."""

    def refuse(name: str) -> Callable[..., Any]:
        def method(self: Any, *_: Any, **__: Any) -> Any:
            raise ValueError(
                f"Shards of adapters are not added to quantized weights, got {name} of a "
                f"{type(self).__name__} on a mesh: save the adapters by save_hf, and merge them "
                f"on one device."
            )

        return method

    for name in ("merge_and_unload", "merge_adapter"):
        if hasattr(type(model.base_model), name):
            setattr(model.base_model, name, MethodType(refuse(name), model.base_model))


def _refusing(name: str, remedy: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # peft's method takes it as one of its **kwargs, by name alone.
        in_place = inspect.signature(getattr(type(self), name)).bind_partial(self, *args).arguments
        weights = (in_place | kwargs).get("state_dict") or self.state_dict()
        sharded = [key for key, x in weights.items() if isinstance(x, DTensor)]
        if sharded:
            raise ValueError(
                f"A model on a mesh has shards of its weights, got {name} of a "
                f"{type(self).__name__} whose {sharded[0]} is one: {remedy}."
            )
        return getattr(type(self), name)(self, *args, **kwargs)

    return method
