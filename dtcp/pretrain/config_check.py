"""Refuses what a config asks for and would not get: on the launcher, before ranks start."""

from copy import deepcopy
from importlib.util import find_spec
from typing import Any

from dtcp.torchtitan.compat import fsdp_reads_annotations
from dtcp.torchtitan.decoder_layers import (
    ADDS_IN_BFLOAT16,
    SPMD_TYPES_ONLY,
    WRONG_UNDER_SPMD_TYPES,
    check_layers,
    foreign_modules,
    model_name,
)
from dtcp.torchtitan.hf_model import HuggingFaceConfig
from dtcp.torchtitan.loss import TokenLoss
from dtcp.torchtitan.parallelize import checkpoint_refusal, compile_of
from dtcp.torchtitan.section import Section
from dtcp.torchtitan.settings import SECTIONS, refusals
from dtcp.torchtitan.stages import rows_of_micro_batch

import torch
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss, MSELoss
from torchtitan.config.override import apply_overrides
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.moe import MoE

from dtcp.distributed.mesh import Degrees
from dtcp.distributed.nodes import neighbours_on_cp
from dtcp.experts import library_for
from dtcp.kernels.softmax.backends import check_kernel_name, check_unrounded
from dtcp.parallelize.expert_exchange import check_experts
from dtcp.parallelize.tensor_parallel import check_divisible
from dtcp.pretrain.data import PackedDocuments, check_balance
from dtcp.pretrain.settings import check_whole_parts
from dtcp.pretrain.validation_data import validates
from dtcp.sequence.arguments import check_ints


def check_settings(config: Any) -> None:
    """Refuse settings that nothing reads, by name, with the value and the remedy.

    Args:
        config: a `Trainer.Config`.
    Raises:
        ValueError: see dtcp/torchtitan/settings.py.
    """
    model = config.model_spec.model
    ours = not isinstance(model, Decoder.Config)
    compile_of(config.compile)
    check_kernel_name(config.dtcp.kernel)
    if config.dtcp.reduce_dtype != "model":
        check_unrounded(config.dtcp.kernel)
    refused = [checkpoint_refusal(config.activation_checkpoint, ours=ours)]
    for section in SECTIONS:
        values = getattr(config, section)
        if values is not None:
            refused += refusals(section, values, ours=ours)
    refused += [_loss_refusal(config), _package_refusal(config), _model_refusal(config)]
    refused.append(_degree_refusal(config.dtcp))
    for text in refused:
        if text:
            raise ValueError(text)


def check_by_torchtitan(config: Any) -> None:
    """Let torchtitan check a copy, as its trainer does on each rank: sizes, then overrides.

    Raises:
        ValueError: a model that the mesh does not divide, or whose positions end before the row;
            an override that replaces nothing, or a layer's attention.
    """
    spec = config.model_spec
    if not isinstance(spec.model, Decoder.Config) and not config.override.imports:
        return
    copied = deepcopy(config)
    try:
        copied.model_spec.model.update_from_config(config=copied)
        replaced = apply_overrides(copied.override, copied)
    except (ImportError, NotImplementedError) as error:
        raise ValueError(
            f"torchtitan takes its own model and overrides, got {spec.name} with "
            f"override.imports={config.override.imports}: {error}."
        ) from error
    if config.override.imports and not replaced:
        raise ValueError(
            f"An override replaces a part of the config, got override.imports="
            f"{config.override.imports}, which replace none: leave them out."
        )
    check_settings(copied)
    if isinstance(spec.model, Decoder.Config):
        before, after = (foreign_modules(x.model_spec.model) for x in (config, copied))
        for where in sorted(after.keys() - before.keys()):
            raise ValueError(
                f"Overrides put modules of torchtitan's in, got {where} of "
                f"{after[where].__module__}.{after[where].__qualname__}: if it treats every token "
                f"alone, put it into the config and say adopt_model(spec, per_token=...)."
            )


def check_on_ranks(config: Any, ranks: int) -> None:
    """Refuse what these ranks, on the machines that they are on, cannot carry out.

    Raises:
        ValueError: naming the setting, its value and what would fit.
    """
    check_batch_size(config, ranks)
    check_expert_degree(config, ranks)
    check_nodes(config)
    check_heads(config)


def check_batch_size(config: Any, ranks: int) -> None:
    """Refuse rows that the ranks cannot share, as torchtitan would on each of them.

    Raises:
        ValueError: a batch that micro-batches of all ranks do not make up, or documents dealt out
            among fewer rows than one of these has.
    """
    degrees = config.parallelism
    inner = degrees.context_parallel_degree * degrees.tensor_parallel_degree
    replicas = ranks // (inner * degrees.pipeline_parallel_degree)
    check_whole_parts(config.training, replicas)
    rows = rows_of_micro_batch(config.training, degrees) * replicas
    own = [config.validator.dataloader] if validates(config) else []
    for loader in (config.dataloader, *own):
        if isinstance(loader, PackedDocuments.Config):
            check_balance(loader, rows)


def check_nodes(config: Any) -> None:
    """Refuse machines that cut the axis cp into unequal parts.

    Raises:
        ValueError: naming the ranks of a machine and what would fit.
    """
    degrees, nodes = config.parallelism, config.dtcp.ranks_per_node
    neighbours_on_cp(degrees.context_parallel_degree, degrees.tensor_parallel_degree, nodes)


def check_heads(config: Any) -> None:
    """Refuse groups of ranks that do not divide cp, and a tp that does not divide the model.

    Sizes that only some families split over tp are refused by their plans, on the ranks.

    Raises:
        ValueError: naming the degree and what it does not divide.
    """
    degrees, section, model = config.parallelism, config.dtcp, config.model_spec.model
    cp, degree = degrees.context_parallel_degree, section.ulysses_degree
    check_ints("The hybrid strategy", least=1, **{"dtcp.ulysses_degree": degree})
    if section.strategy == "hybrid" and cp > 1 and cp % degree:
        raise ValueError(
            f"Ranks exchange heads in groups of equal size, got dtcp.ulysses_degree={degree} with "
            f"parallelism.context_parallel_degree={cp}: choose a divisor."
        )
    if shape := getattr(model, "shape", None):
        sizes = {"num_heads": shape.num_heads, "vocab_size": shape.vocab_size}
        check_divisible(sizes, degrees.tensor_parallel_degree)


def check_expert_degree(config: Any, ranks: int) -> None:
    """Refuse ranks of ep that the mesh or the experts do not divide into.

    Raises:
        ValueError: a model without experts, or a number that does not fit.
    """
    degrees, spec = config.parallelism, config.model_spec
    ep = degrees.expert_parallel_degree
    _check_exchange(config, ranks)
    if ep == 1:
        return
    name = f"parallelism.expert_parallel_degree={ep}"
    check_ints("A mesh", least=1, **{"parallelism.expert_parallel_degree": ep})
    outer = degrees.data_parallel_replicate_degree * degrees.pipeline_parallel_degree
    sparse = ranks // outer
    if sparse % ep:
        raise ValueError(
            f"Ranks of ep are carved out of dp_shard * cp * tp, got {name} with {sparse} of them: "
            f"choose an ep that divides it."
        )
    _check_split_experts(config, sparse)
    counts = expert_counts(spec.model)
    if not counts:
        raise ValueError(
            f"Ranks of ep have different experts, got {name} for {spec.name} {spec.flavor}, which "
            f"has none: set it to 1."
        )
    for count in counts:
        check_experts(count, ep)


def _check_exchange(config: Any, ranks: int) -> None:
    """Refuse settings of the exchange of tokens that would not be used."""
    section, spec, degrees = config.dtcp, config.model_spec, config.parallelism
    check_ints("A mesh", least=0, **{"dtcp.ranks_per_node": section.ranks_per_node})
    if section.ranks_per_node and ranks % section.ranks_per_node:
        raise ValueError(
            f"Machines have equally many ranks, got dtcp.ranks_per_node={section.ranks_per_node} "
            f"with {ranks} ranks: give a number that divides them."
        )
    name, value = "dtcp.expert_exchange", section.expert_exchange
    if section.expert_tensor_parallel_degree != 1:
        name = "dtcp.expert_tensor_parallel_degree"
        value = section.expert_tensor_parallel_degree
    elif section.ranks_per_node and degrees.context_parallel_degree == 1:
        name, value = "dtcp.ranks_per_node", section.ranks_per_node
    elif section.expert_exchange == "auto":
        return
    if degrees.expert_parallel_degree == 1:
        raise ValueError(
            f"Tokens travel to experts on other ranks, got {name}={value} with "
            f"parallelism.expert_parallel_degree=1: raise the degree, or leave it out."
        )
    if isinstance(spec.model, Decoder.Config):
        raise ValueError(
            f"torchtitan's own models send tokens themselves, got {name}={value} for {spec.name}: "
            f"leave it out, and choose a moe_comm_backend where the model is made."
        )
    library_for(section.expert_exchange, "")


def _check_split_experts(config: Any, sparse: int) -> None:
    """Refuse a tp beside ep that cannot split the channels of experts."""
    etp, degrees = config.dtcp.expert_tensor_parallel_degree, config.parallelism
    if etp == 1:
        return
    if isinstance(config.model_spec.model, HuggingFaceConfig):
        raise ValueError(
            f"Experts of transformers are whole under ep, got dtcp.expert_tensor_parallel_degree="
            f"{etp}: leave it out, and ep takes ranks of tp, too."
        )
    cp, tp = degrees.context_parallel_degree, degrees.tensor_parallel_degree
    ep = degrees.expert_parallel_degree
    Degrees(dp_shard=sparse // (cp * tp), cp=cp, tp=tp, ep=ep, etp=etp)


def expert_counts(model: Any) -> set[int]:
    """How many experts the layers of a model's config choose from."""
    if isinstance(model, HuggingFaceConfig):
        return model.expert_counts()
    if not isinstance(model, Decoder.Config):
        return {model.num_experts} - {0}
    return {each.num_experts for _, each, _, _ in model.traverse(MoE.Config)}


def _loss_refusal(config: Any) -> str:
    """Why torchtitan's losses that cannot work here are refused; any other is the user's own."""
    loss = config.loss
    if isinstance(loss, ChunkedLossWrapper.Config):
        why = "it calls the head itself, which a sharded model does not leave to it"
    elif isinstance(loss, MSELoss.Config):
        why = "labels are token ids"
    elif isinstance(loss, CrossEntropyLoss.Config) and _has_types_over_tp(config.parallelism):
        why = "under spmd_types it takes no logits that know how they are sharded over tp"
    elif type(loss).__qualname__ == "MTPLoss.Config":
        why = "it shifts labels inside shards of rows"
    elif type(loss).__qualname__ == "BaseLoss.Config":
        why = "it is no loss of its own"
    else:
        return ""
    return (
        f"Losses are summed over the tokens of a shard, got loss={type(loss).__qualname__}: {why}; "
        f"use dtcp.torchtitan.loss.{TokenLoss.__name__}, which works in chunks."
    )


def _has_types_over_tp(parallelism: Any) -> bool:
    return parallelism.spmd_backend == "spmd_types" and parallelism.tensor_parallel_degree > 1


def _package_refusal(config: Any) -> str:
    """Why a setting is refused for which this machine lacks a package or a device."""
    if config.metrics.enable_wandb and find_spec("wandb") is None:
        return (
            "Metrics go to Weights & Biases through its package, got metrics.enable_wandb=True "
            "without it: pip install wandb."
        )
    of_cuda = {
        "profiler.enable_memory_snapshot": config.profiler.enable_memory_snapshot,
        "training.gc_debug": config.training.gc_debug,
    }
    for name, asked in of_cuda.items():
        if asked and not torch.cuda.is_available():
            return (
                f"What is recorded of memory is recorded by CUDA's allocator, got {name}=True "
                f"without CUDA: leave it out."
            )
    accelerated = torch.accelerator.is_available() and config.dtcp.device != "cpu"
    if config.training.enable_cpu_offload and not accelerated:
        return (
            "Parameters are offloaded from an accelerator, got training.enable_cpu_offload=True "
            "for ranks on the CPU: leave it out."
        )
    implementation = config.optimizer.implementation
    if implementation == "fused_opt_states_bf16" and not accelerated:
        return (
            f"An optimizer's state in bf16 is read by kernels of accelerators, got optimizer."
            f"implementation={implementation} for ranks on the CPU: choose fused or foreach."
        )
    return ""


def _degree_refusal(section: Section) -> str:
    """Why a degree of the hybrid strategy is refused for another strategy."""
    degree = section.ulysses_degree
    if section.strategy == "hybrid" or degree == Section().ulysses_degree:
        return ""
    return (
        f"Ranks exchange heads in groups under the hybrid strategy, got dtcp.ulysses_degree="
        f"{degree} with dtcp.strategy={section.strategy}: name hybrid, or leave it out."
    )


def _model_refusal(config: Any) -> str:
    """Why a decoder of torchtitan is not adopted, or not on this mesh."""
    spec, degrees = config.model_spec, config.parallelism
    if not isinstance(spec.model, Decoder.Config):
        return ""
    check_layers(spec)
    if model_name(spec.model) == ADDS_IN_BFLOAT16:
        param = config.training.mixed_precision_param
        if param != "bfloat16" or config.dtcp.verify:
            return (
                f"Experts of torchtitan's gpt-oss compute in bfloat16 and are added to nothing "
                f"else, got training.mixed_precision_param={param} with dtcp.verify="
                f"{config.dtcp.verify}, which is in fp32: set bfloat16, and leave the other out."
            )
    return _backend_refusal(spec, degrees)


def _backend_refusal(spec: Any, degrees: Any) -> str:
    """Why a backend does not shard a decoder of torchtitan over tp or ep, or not correctly."""
    backend, tp = degrees.spmd_backend, degrees.tensor_parallel_degree
    ep, name = degrees.expert_parallel_degree, model_name(spec.model)
    has = f"parallelism.spmd_backend={backend} with parallelism.tensor_parallel_degree={tp}"
    if backend != "spmd_types":
        if tp > 1 and name in SPMD_TYPES_ONLY:
            return (
                f"torchtitan shards the heads of {spec.name} under spmd_types alone, got {has}: "
                f"set the degree to 1, or the backend to spmd_types (torch 2.14)."
            )
        return ""
    if tp > 1 and name in WRONG_UNDER_SPMD_TYPES:
        return (
            f"A model computes the same on any mesh, got {has} for {spec.name}, and "
            f"{WRONG_UNDER_SPMD_TYPES[name]}: set the backend to partial_dtensor."
        )
    if ep > 1:
        return (
            f"torchtitan's experts were never run under spmd_types, whose exchange of tokens gloo "
            f"does not have, got {has} and parallelism.expert_parallel_degree={ep} for {spec.name}:"
            f" set the backend to partial_dtensor."
        )
    if tp > 1 and not fsdp_reads_annotations():
        return (
            f"FSDP takes what spmd_types has sharded over tp from torch 2.14 on, got {has} on "
            f"torch {torch.__version__}: set the backend to partial_dtensor."
        )
    return ""
