"""Load the weights of a transformers model that was parallelized on the meta device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dtcp.sequence.arguments import check_kind


@torch.no_grad()
def load_hf(model: Any, weights: Mapping[str, Tensor], *, device: torch.device | str) -> Any:
    """Allocate a model that `parallelize_hf` got on the meta device; load each rank's shards.

    Args:
        weights: whole tensors by transformers' names, as safetensors files hold them; a weight
            that two modules share may have only one of its names. They are read one at a time.
    Raises:
        ValueError: a weight that is missing, left over, or of another shape.
    """
    check_kind("load_hf", nn.Module, model=model)
    check_kind("load_hf", Mapping, weights=weights)
    model.to_empty(device=device)
    _fill_buffers(model)
    names: dict[Tensor, list[str]] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        names.setdefault(x, []).append(name)
    missing = [aliases for aliases in names.values() if not weights.keys() & set(aliases)]
    left_over = weights.keys() - {name for aliases in names.values() for name in aliases}
    if missing or left_over:
        raise ValueError(
            f"Weights are those of the model, got none for {missing[:4]} and no use for "
            f"{sorted(left_over)[:4]}: load the checkpoint of this config."
        )
    for x, aliases in names.items():
        name = next(name for name in aliases if name in weights)
        _copy_shard(name, x, weights[name])
    return model


def _copy_shard(name: str, x: Tensor, whole: Tensor) -> None:
    if whole.shape not in (x.shape, *_shapes_with_gate_and_up_merged(x.shape)):
        raise ValueError(
            f"Weights have the shape of their parameter, got {name} of {tuple(whole.shape)} for "
            f"{tuple(x.shape)}: load the checkpoint of this config."
        )
    whole = whole.reshape(x.shape).to(x.device, x.dtype)
    if isinstance(x, DTensor):
        sharded = distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None)
        x.to_local().copy_(sharded.to_local())
    else:
        x.copy_(whole)


def _shapes_with_gate_and_up_merged(shape: torch.Size) -> list[torch.Size]:
    """The shapes [.., 2F, ..] that a checkpoint may have where the parameter is [.., 2, F, ..]."""
    return [
        torch.Size((*shape[:dim], 2 * shape[dim + 1], *shape[dim + 2 :]))
        for dim in range(1, len(shape) - 1)
        if shape[dim] == 2
    ]


def _fill_buffers(model: Any) -> None:
    """Fill what no checkpoint holds, for example rotary frequencies, by transformers' own code."""
    in_checkpoint = set(model.state_dict())
    for name, module in model.named_modules():
        buffers = [f"{name}.{key}" for key, _ in module.named_buffers(recurse=False)]
        if any(buffer not in in_checkpoint for buffer in buffers):
            _mark_uninitialized(module)
            model._init_weights(module)


def _mark_uninitialized(module: nn.Module) -> None:
    for x in (module, *module.parameters(recurse=False), *module.buffers(recurse=False)):
        vars(x).pop("_is_hf_initialized", None)
