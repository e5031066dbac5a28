"""Memory and weights for a model of transformers that was parallelized on the meta device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def load_hf(model: Any, weights: Mapping[str, Tensor], *, device: torch.device | str) -> Any:
    """Fill a model that `parallelize_hf` was given on the meta device, each rank its shards.

    Args:
        weights: whole tensors by transformers' names, as safetensors files hold them; a weight
            that two modules share may have one of its names. Read one at a time.
    Raises:
        ValueError: a weight that is missing, left over, or of another size.
    """
    model.to_empty(device=device)
    _fill_buffers(model)
    names: dict[Tensor, list[str]] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        names.setdefault(x, []).append(name)
    missing = [each for each in names.values() if not weights.keys() & set(each)]
    left_over = weights.keys() - {name for each in names.values() for name in each}
    if missing or left_over:
        raise ValueError(
            f"Weights are those of the model, got none for {missing[:4]} and no use for "
            f"{sorted(left_over)[:4]}: load the checkpoint of this config."
        )
    for x, known in names.items():
        name = next(name for name in known if name in weights)
        _fill(name, x, weights[name])
    return model


def _fill(name: str, x: Tensor, whole: Tensor) -> None:
    if whole.shape not in (x.shape, *_with_parts_merged(x.shape)):
        raise ValueError(
            f"Weights have the shape of their parameter, got {name} of {tuple(whole.shape)} for "
            f"{tuple(x.shape)}: load the checkpoint of this config."
        )
    whole = whole.reshape(x.shape).to(x.device, x.dtype)
    if isinstance(x, DTensor):
        part = distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None)
        x.to_local().copy_(part.to_local())
    else:
        x.copy_(whole)


def _with_parts_merged(shape: torch.Size) -> list[torch.Size]:
    """Shapes of the same numbers where experts' gate and up have no dim of their own."""
    return [
        torch.Size((*shape[:dim], 2 * shape[dim + 1], *shape[dim + 2 :]))
        for dim in range(1, len(shape) - 1)
        if shape[dim] == 2
    ]


def _fill_buffers(model: Any) -> None:
    """What is in no checkpoint, rotary frequencies say, by transformers' own initialization."""
    kept = set(model.state_dict())
    for name, module in model.named_modules():
        own = [f"{name}.{key}" for key, _ in module.named_buffers(recurse=False)]
        if any(key not in kept for key in own):
            _forget_initialized(module)
            model._init_weights(module)


def _forget_initialized(module: nn.Module) -> None:
    for x in (module, *module.parameters(recurse=False), *module.buffers(recurse=False)):
        vars(x).pop("_is_hf_initialized", None)
