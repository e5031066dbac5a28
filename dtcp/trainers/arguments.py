"""Refuses, by name, what a Trainer's arguments ask for and a mesh does in another way."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from dtcp.distributed.mesh import ParallelMesh
from dtcp.huggingface.install import has_mixers
from dtcp.parallelize.compile import Compile, has_compiled_blocks
from dtcp.parallelize.plans.adapters import adapted_model
from dtcp.trainers.policy_arguments import names_of_trl, trains_policy


def check_trained_model(model: Any) -> None:
    """Refuse anything but a model that could be put on a mesh.

    Raises:
        TypeError: not a model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"A Trainer on a mesh trains a model of transformers, got model of type "
            f"{type(model).__name__}: build it, or give parallelize_hf(model, mesh)."
        )


def is_on_mesh(model: Any) -> bool:
    """Whether parallelize_hf has placed a model, or the one inside of its adapters."""
    return has_mixers(adapted_model(model))


def asked_of_placing(args: Any) -> dict[str, Any]:
    """Options that training arguments imply for the call that puts a model on the mesh."""
    return {"compile": Compile(args.torch_compile_backend)} if args.torch_compile else {}


def check_placed_as_asked(args: Any, model: Any) -> None:
    """Refuse arguments that a model that is on the mesh already cannot follow.

    Raises:
        ValueError: torch_compile for blocks that were placed without compile.
    """
    if args.torch_compile and not has_compiled_blocks(model):
        raise ValueError(
            f"Blocks are compiled where a model is put on its mesh, got torch_compile=True with a "
            f"{type(model).__name__} that was placed without: pass compile=Compile() to "
            f"parallelize_hf, or give the Trainer the model as it was built."
        )


def check_reference(trainer: type, named: Mapping[str, Any]) -> None:
    """Refuse sharded adapters that a trainer would copy to make its reference.

    Args:
        named: the trainer's arguments by name.
    Raises:
        ValueError: such a model, without a ref_model.
    """
    model = named.get("model")
    makes_copies = _has_reference(trainer) and named.get("ref_model") is None
    if trains_policy(trainer):
        makes_copies = getattr(named.get("args"), "beta", 0.0) != 0.0
    if not makes_copies or not isinstance(model, nn.Module) or not is_on_mesh(model):
        return
    if adapted_model(model) is not model and "ref" not in getattr(model, "peft_config", {}):
        raise ValueError(
            f"The reference of adapters is a copy of them that {trainer.__name__} puts into the "
            f"model, before it is sharded, got a {type(model).__name__} on its mesh and no "
            f"ref_model: give the Trainer the model as it was built."
        )


def _has_reference(trainer: type) -> bool:
    """Whether a trainer of TRL has a reference model; the mixin's own methods do not count."""
    return any(
        each.__module__.startswith("trl.") and "compute_ref_log_probs" in vars(each)
        for each in trainer.__mro__
    )


TRL_TRAINERS = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer", "GRPOTrainer")
"""Trainers of TRL whose losses are known to equal those of one process."""


def check_trainer(trainer: type) -> None:
    """Refuse a trainer of TRL that only generates what it trains on, or reads its model otherwise.

    Raises:
        TypeError: a class of TRL that is not in TRL_TRAINERS and derives from none of them.
    """
    names = names_of_trl(trainer)
    if names and names[0] not in TRL_TRAINERS:
        raise TypeError(
            f"A trainer of TRL on a mesh is one of {', '.join(TRL_TRAINERS)}, whose rows are given "
            f"to it, got {names[0]}: let a plain model generate rows, and train on them by one of "
            f"these or by WholeRows (docs/trainers.md)."
        )


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Refuse callbacks, or classes of them, that copy the model they find.

    Raises:
        TypeError: TRL's average of weights, which makes a whole model of what is sharded.
    """
    for each in callbacks:
        kind = each if isinstance(each, type) else type(each)
        if "BEMACallback" in names_of_trl(kind):
            raise TypeError(
                f"A callback of a Trainer on a mesh leaves the model sharded, got {kind.__name__}, "
                f"which copies it whole: leave it out, and average saved checkpoints."
            )


def computes_on_rows(trainer: type) -> bool:
    """Whether a class computes its own loss, from rows as well, which must be on the device."""
    owners = (each for each in trainer.__mro__ if "compute_loss" in vars(each))
    foreign = (each for each in owners if not each.__module__.startswith("dtcp."))
    return not next(foreign).__module__.startswith("transformers.")


def smooths_by_itself(trainer: type) -> bool:
    """Whether a class smooths labels itself, from logits; others leave it to the model."""
    return "SFTTrainer" in names_of_trl(trainer)


def check_parts_of_loss(trainer: Any, z_loss: float, *, of_tokens: bool) -> None:
    """Refuse parts of a token loss that a trainer's own loss would silently leave out.

    Args:
        of_tokens: whether labels belong to tokens, not to rows.
    Raises:
        ValueError: smoothing or a z-loss that nothing computes.
    """
    of_trl = bool(names_of_trl(type(trainer)))
    smooths = not of_trl or smooths_by_itself(type(trainer))
    adds = of_tokens and not of_trl and trainer.compute_loss_func is None
    smoothing = trainer.args.label_smoothing_factor
    for name, value, has in (
        ("label_smoothing_factor", smoothing, smooths),
        ("z_loss", z_loss, adds),
    ):
        if value and not has:
            raise ValueError(
                f"A trainer on a mesh takes the parts of a loss that it computes, got {name}="
                f"{value} with the own loss of {type(trainer).__name__}, which has no such part: "
                f"set it to 0."
            )


def check_launch(accelerator: Any, mesh: ParallelMesh) -> None:
    """Refuse an environment that contradicts the mesh.

    Raises:
        ValueError: other ranks than the mesh has, or a parallelism of accelerate's own.
    """
    known, world = accelerator.num_processes, mesh.degrees.world
    if known != world:
        raise ValueError(
            f"A Trainer learns of all ranks of its mesh from the environment, got num_processes="
            f"{known} for {world} ranks: start them by torchrun or accelerate launch."
        )
    plugins = ("fsdp_plugin", "deepspeed_plugin", "parallelism_config")
    asked = [name for name in plugins if getattr(accelerator.state, name, None) is not None]
    if asked:
        raise ValueError(
            f"A mesh says how a model is sharded, got {asked[0]} of a configuration of accelerate: "
            f"start ranks by torchrun, or by a configuration for several GPUs only."
        )


def check_given_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Refuse an optimizer of parameters that are not the placed model's.

    Raises:
        ValueError: made before the model was put on the mesh.
    """
    if optimizer is None:
        return
    own = {id(p) for p in model.parameters()}
    strange = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    if strange:
        raise ValueError(
            f"An optimizer steps the parameters of a model on its mesh, got optimizers with "
            f"{len(strange)} parameters of others: call parallelize_hf(model, mesh) first and make "
            f"the optimizer of its parameters, or name it by optim."
        )


OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers that step shards as they step whole weights, by transformers' names."""


def check_optimizer_name(args: Any) -> None:
    """Refuse an optimizer, by name, that would step shards by what each shard alone says.

    Raises:
        ValueError: naming those that are known.
    """
    name = getattr(args.optim, "value", args.optim)
    if name not in OPTIMIZERS:
        raise ValueError(
            f"A Trainer on a mesh makes an optimizer that steps DTensors, got optim={name!r}: set "
            f"one of {', '.join(OPTIMIZERS)}, or pass optimizers=(one that knows DTensors, None)."
        )


def check_training_arguments(args: Any, mesh: ParallelMesh) -> None:
    """Refuse training arguments that would be ignored, or done twice, on a mesh.

    Raises:
        ValueError: naming the first one, and what to do instead.
    """
    for name, value, remedy in _refused(args, mesh):
        raise ValueError(
            f"A Trainer on a mesh takes the arguments that it carries out, got {name}={value!r}: "
            f"{remedy}."
        )


def _refused(args: Any, mesh: ParallelMesh) -> Iterator[tuple[str, Any, str]]:
    plan = "parallelize_hf(model, mesh, ..) shards the model; leave it out"
    ddp = "leave it out, for parameters are sharded by FSDP"
    for name, remedy in {
        "fsdp": plan,
        "deepspeed": plan,
        "parallelism_config": plan,
        "fp16": "set bf16=True, which needs no scaling of losses",
        "fp16_full_eval": "leave it False: weights stay as they are trained",
        "bf16_full_eval": "leave it False: weights stay as they are trained",
        "torch_compile_mode": "leave it out, for blocks are compiled one by one",
        "ddp_find_unused_parameters": ddp,
        "ddp_bucket_cap_mb": ddp,
        "ddp_broadcast_buffers": ddp,
        "ddp_static_graph": ddp,
        "save_on_each_node": "leave it False: one rank writes, into a folder that all ranks read",
        "predict_with_generate": "leave it False: save the model, and generate with a plain one",
        "enable_jit_checkpoint": "leave it False: a signal reaches ranks at different steps; a "
        "callback that hears it may set control.should_save, which holds on all ranks",
        "auto_find_batch_size": "choose a batch size; a part of the ranks would start again",
        "neftune_noise_alpha": "leave it out, for noise would depend on the mesh",
        "activation_offloading": "recompute activations instead, by gradient_checkpointing",
        "use_liger_kernel": "leave it out, for it replaces the forward that is on the mesh",
        "debug": "leave it out, for its hooks print whole tensors, and a rank has shards",
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
    if mesh.size("batch") > 1 and not args.accelerator_config.even_batches:
        yield (
            "accelerator_config.even_batches",
            False,
            "leave it True, for a rank without rows would not join the others in a step",
        )
    if mesh.size("batch") > 1 and args.accelerator_config.split_batches:
        yield (
            "accelerator_config.split_batches",
            True,
            "leave it False, and say the rows of one batch rank: evaluations weigh losses by them",
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
