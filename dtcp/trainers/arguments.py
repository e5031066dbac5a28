"""What a Trainer's arguments ask for that a mesh does in another way, refused by name."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from dtcp.distributed.mesh import ParallelMesh
from dtcp.huggingface.registry import IMPLEMENTATION


def check_trained_model(model: Any) -> None:
    """Refuse a model that is not on the mesh.

    Raises:
        TypeError, ValueError: no model, or one that parallelize_hf has not placed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"A Trainer on a mesh trains a model that parallelize_hf has placed, got model of type "
            f"{type(model).__name__}: build it, and give parallelize_hf(model, mesh)."
        )
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != IMPLEMENTATION:
        raise ValueError(
            f"A Trainer on a mesh trains a model that parallelize_hf has placed, got "
            f"{type(model).__name__} as it was built: give parallelize_hf(model, mesh)."
        )


def check_training_arguments(args: Any, mesh: ParallelMesh) -> None:
    """Refuse training arguments that would be ignored, or done twice, on a mesh.

    Raises:
        ValueError: naming the first of them, and where to say it instead.
    """
    for name, value, remedy in _refused(args, mesh):
        raise ValueError(
            f"A Trainer on a mesh takes the arguments that it carries out, got {name}={value!r}: "
            f"{remedy}."
        )


def _refused(args: Any, mesh: ParallelMesh) -> Iterator[tuple[str, Any, str]]:
    plan = "parallelize_hf(model, mesh, ..) shards the model; leave it out"
    dtype = "pass fsdp=FSDP(mixed_precision=..) to parallelize_hf and leave it False"
    for name, remedy in {
        "fsdp": plan,
        "deepspeed": plan,
        "parallelism_config": plan,
        "fp16": dtype,
        "bf16": dtype,
        "fp16_full_eval": dtype,
        "bf16_full_eval": dtype,
        "torch_compile": "pass compile=Compile() to parallelize_hf",
        "auto_find_batch_size": "choose a batch size; a part of the ranks would start again",
        "neftune_noise_alpha": "leave it out, for noise would depend on the mesh",
        "use_liger_kernel": "leave it out, for it replaces the forward that is on the mesh",
        "eval_use_gather_object": "leave it False, for ranks of a cp group give the same",
    }.items():
        value = getattr(args, name, None)
        if value:
            yield name, value, remedy
    if mesh.size("batch") > 1 and not args.average_tokens_across_devices:
        yield (
            "average_tokens_across_devices",
            False,
            "leave it True, for a mean over ranks is not the mean over tokens",
        )
    if args.accelerator_config.dispatch_batches:
        yield (
            "accelerator_config.dispatch_batches",
            True,
            "leave it None: every rank reads its own rows, those of a cp group the same ones",
        )
    if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        yield (
            "train_sampling_strategy",
            args.train_sampling_strategy,
            "leave it out: it deals rows to all ranks, not to batch ranks",
        )
