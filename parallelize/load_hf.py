"""Load the weights of a transformers model that was parallelized on the meta device."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dtcp.huggingface.quantized import check_no_quantized
from dtcp.huggingface.stages import weights_elsewhere
from dtcp.parallelize.hf_files import WeightFiles, WeightGroup, check_not_quantized, weight_groups
from dtcp.parallelize.tied_parameters import find_tied_parameters, restore_tied_parameters
from dtcp.sequence.arguments import check_kind, check_tensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def load_hf(
    model: Any, weights: Mapping[str, Tensor] | str | Path, *, device: torch.device | str
) -> Any:
    """Allocate a model that `parallelize_hf` got on the meta device; load each rank's shards.

    Args:
        weights: the folder that save_pretrained wrote, in one file or in several with an index; or
            whole tensors, by the names of such files or of the model. A weight that two modules
            share may have only one of its names. They are read one parameter at a time.
    Raises:
        ValueError: a weight that is missing, left over, of another shape, quantized or not finite;
            two that differ where the model has one; a folder or a file that is not there.
    """
    check_kind("load_hf", nn.Module, model=model)
    files, groups = _read_names(model, weights)
    tied = find_tied_parameters(model)
    model.to_empty(device=device)
    if find_tied_parameters(model) != tied:
        # Parameters that FSDP does not hold leave the meta device one name at a time (torch 2.13).
        restore_tied_parameters(model, tied)
    _fill_buffers(model)
    _fill_parameters(model, files, groups)
    return model


@torch.no_grad()
def fill_hf(model: Any, weights: Mapping[str, Tensor] | str | Path) -> None:
    """Replace the weights of a model that is on its devices, each rank its shards.

    Args, Raises: as load_hf.
    """
    check_kind("fill_hf", nn.Module, model=model)
    _fill_parameters(model, *_read_names(model, weights))


@torch.no_grad()
def fill_adapters(model: Any, folder: Path) -> None:
    """Replace the adapters of a PeftModel by those that a folder of peft's holds.

    peft keeps each but the default one in a folder of its name inside.

    Raises:
        ValueError: no such file, or adapters of other names or shapes.
    """
    for adapter in model.peft_config:
        _fill_adapter(model, adapter, folder if adapter == "default" else folder / adapter)


def _fill_adapter(model: Any, adapter: str, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    files = WeightFiles(folder)
    # By the names that peft writes, of layers that are trained whole as well (modules_to_save).
    parameters, with_embeddings = (
        get_peft_model_state_dict(
            model,
            model.state_dict(keep_vars=True),
            adapter_name=adapter,
            save_embedding_layers=embeddings,
        )
        for embeddings in (False, True)
    )
    # peft writes embeddings of another size than those of the model that was adapted.
    parameters |= {name: x for name, x in with_embeddings.items() if name in files}
    left_over = [name for name in files if name not in parameters]
    _check_names(model, [name for name in parameters if name not in files], left_over)
    for name, x in parameters.items():
        _copy_shard(name, x, files[name])


def _read_names(
    model: Any, weights: Mapping[str, Tensor] | str | Path
) -> tuple[Mapping[str, Tensor], list[WeightGroup]]:
    """The weights, and which of them make which parameter."""
    check_kind("load_hf", (Mapping, str, Path), weights=weights)
    check_no_quantized(
        "load_hf fills weights that are numbers",
        model,
        "call from_pretrained with the quantization_config on every rank, then parallelize_hf",
    )
    files = weights if isinstance(weights, Mapping) else WeightFiles(Path(weights))
    groups, left_over = weight_groups(model, files)
    if left_over and not isinstance(weights, Mapping):
        check_not_quantized(Path(weights), left_over)
    _check_names(model, [], left_over)
    for name, first in weights_elsewhere(model).tied:
        if name in files and first in files:
            # Each end of the model has one of them; all stages see both.
            _check_shared(model, (name, files[name]), (first, files[first]))
    return files, groups


def _fill_parameters(
    model: Any, files: Mapping[str, Tensor], groups: Sequence[WeightGroup]
) -> None:
    parameters = model.state_dict(keep_vars=True)
    filled: dict[Tensor, tuple[str, WeightGroup]] = {}
    for group in groups:
        for name, whole in group.weights(model, files).items():
            x = parameters[name]
            if x in filled:
                other, before = filled[x]
                _check_shared(model, (name, whole), (other, before.weights(model, files)[other]))
            _copy_shard(name, x, whole)
            filled[x] = name, group
    # Copies are made equal to the first stage's once that has its own (dtcp.copied_weights).
    copies = weights_elsewhere(model).copies
    missing = [name for name, x in parameters.items() if x not in filled and name not in copies]
    _check_names(model, missing, [])


def _check_names(model: nn.Module, missing: Sequence[str], left_over: Sequence[str]) -> None:
    if missing or left_over:
        raise ValueError(
            f"Weights are those of the model, got none for {list(missing[:4])} and no use for "
            f"{sorted(left_over)[:4]} in {type(model).__name__}: load the checkpoint of this "
            f"config."
        )


def _check_shared(model: Any, *weights: tuple[str, Tensor]) -> None:
    """Refuse two weights where the model has one: transformers would not share it."""
    (name, whole), (other, before) = weights
    if not torch.equal(whole, before.to(whole.dtype)):
        raise ValueError(
            f"Modules that share a weight have one, got {name} and {other} that differ, for a "
            f"{type(model).__name__}: set tie_word_embeddings=False in its config, or leave one "
            f"of them out."
        )


def _copy_shard(name: str, x: Tensor, whole: Tensor) -> None:
    named: dict[str, Any] = {name: whole}
    check_tensor("load_hf", **named)
    if whole.shape not in (x.shape, *_shapes_with_gate_and_up_merged(x.shape)):
        raise ValueError(
            f"Weights have the shape of their parameter, got {name} of {tuple(whole.shape)} for "
            f"{tuple(x.shape)}: load the checkpoint of this config."
        )
    if x.is_floating_point() and whole.dtype not in _DTYPES:
        raise ValueError(
            f"Weights are numbers that need no scale, got {name} of dtype {whole.dtype}: load a "
            f"checkpoint that is not quantized."
        )
    if whole.is_floating_point() and not _is_finite(whole):
        raise ValueError(
            f"Weights are finite, got {name} with {int((~whole.isfinite()).sum())} entries of NaN "
            f"or infinity: load another checkpoint; training from this one would be lost."
        )
    whole = whole.reshape(x.shape).to(x.device, x.dtype)
    if isinstance(x, DTensor):
        sharded = distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None)
        x.to_local().copy_(sharded.to_local())
    else:
        x.copy_(whole)


def _is_finite(whole: Tensor) -> bool:
    """Whether all entries are: the largest and the smallest say so 25 times as fast, NaN as well.

    Each rank reads all weights: at `isfinite`'s 0.7 GB/s of a core, 70B of them took minutes.
    """
    if not whole.numel() or whole.dtype not in _DTYPES:
        return bool(whole.isfinite().all())
    return all(bool(x.isfinite()) for x in whole.aminmax())


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
