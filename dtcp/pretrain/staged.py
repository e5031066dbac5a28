"""Runs over pipeline stages: what is refused, and what stages tell each other."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from dtcp.torchtitan.hf_model import HuggingFaceConfig
from dtcp.torchtitan.stages import (
    ONE_STAGE,
    layers_of_stages,
    micro_batches,
)

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.deepseek_v3.mtp import MTPDecoder

from dtcp.sequence.arguments import check_ints

T = TypeVar("T")


def check_stages(config: Any) -> None:
    """Refuse stages that a run cannot have, before ranks start.

    Args:
        config: a `Trainer.Config`.
    Raises:
        ValueError: naming the setting, its value and the remedy.
    """
    degrees, training = config.parallelism, config.training
    if degrees.pipeline_parallel_degree == 1:
        return
    for name, least in (
        ("degree", 1),
        ("microbatch_size", 1),
        ("first_stage_less_layers", 0),
        ("last_stage_less_layers", 0),
        ("layers_per_stage", 1),
    ):
        value = getattr(degrees, f"pipeline_parallel_{name}")
        if value is not None:
            check_ints("Stages", least=least, **{f"parallelism.pipeline_parallel_{name}": value})
    for refusal in _refusals(config):
        raise ValueError(refusal)
    stages = len(layers_of_stages(degrees, _layers(config.model_spec.model)))
    _check_micro_batches(training, degrees, stages)


def _refusals(config: Any) -> Iterator[str]:
    degrees, spec, section = config.parallelism, config.model_spec, config.dtcp
    degree = f"--parallelism.pipeline_parallel_degree {degrees.pipeline_parallel_degree}"
    if why := stage_refusal(spec):
        yield (
            f"A model is cut into stages between layers, got {degree} for {spec.name} "
            f"{spec.flavor}, but {why}: set it to 1, and cp or fsdp higher."
        )
    typed = degrees.spmd_backend == "spmd_types" and degrees.tensor_parallel_degree > 1
    if typed and isinstance(spec.model, Decoder.Config):
        yield (
            f"Stages of torchtitan's own models were never run under spmd_types with tp, got "
            f"{degree} with parallelism.spmd_backend=spmd_types: set it to partial_dtensor."
        )
    if torch.__version__ < "2.13":
        yield f"Stages need torch 2.13, got {degree} with torch {torch.__version__}: set it to 1."
    opened = {
        "dtcp.strategy auto": section.strategy == "auto",
        "dtcp.layout auto": section.layout == "auto",
        "dtcp.forecast": section.forecast,
    }
    for name, asked in opened.items():
        if asked:
            yield (
                f"The planner runs all layers of a model on every rank, got --{name} with "
                f"{degree}: leave it out, or name a strategy and a layout."
            )
    if config.checkpoint.create_seed_checkpoint:
        yield (
            f"Weights to start from are saved without stages, got --checkpoint."
            f"create_seed_checkpoint with {degree}: set the degree to 1; runs with stages load it."
        )


def _layers(model: Any) -> int:
    if isinstance(model, HuggingFaceConfig):
        return model.num_layers
    return len(model.layers) if isinstance(model, Decoder.Config) else model.shape.num_layers


def stage_refusal(spec: Any) -> str:
    """Why a model is not cut into stages; nothing where it is."""
    if not isinstance(spec.model, Decoder.Config):
        why: str = spec.model.stage_refusal()
        return why
    known = (Decoder.forward, MTPDecoder.forward)
    if spec.pipelining_fn is None or spec.model._owner.forward not in known:
        return "its own forward runs it whole"
    if getattr(spec.model, "mtp_layers", None):
        return "what predicts further ahead reads the first stage's embedding"
    if spec.model.enable_weight_tying:
        return "its head is tied to its embedding, which is in another stage"
    return ""


def _check_micro_batches(training: Any, degrees: Any, stages: int) -> None:
    """Refuse numbers of micro-batches that a schedule does not run."""
    ranks, schedule = degrees.pipeline_parallel_degree, degrees.pipeline_parallel_schedule
    rows, each = training.local_batch_size, degrees.pipeline_parallel_microbatch_size
    count = micro_batches(training, degrees)
    if rows % each:
        wanted = f"a multiple of {each}"
    elif schedule == "1F1B" and count < stages:
        wanted = f"{stages * each} or more, a micro-batch for each of {stages} stages"
    elif schedule not in ONE_STAGE and count % max(1, count // ranks):
        wanted = f"rows for a multiple of {ranks} micro-batches"
    else:
        return
    raise ValueError(
        f"A schedule runs whole micro-batches, got --training.local_batch_size {rows} with "
        f"--parallelism.pipeline_parallel_microbatch_size {each} under {schedule}: give {wanted}."
    )


def loss_of_stages(losses: Sequence[Tensor], pp: DeviceMesh | None, device: Any) -> Tensor:
    """The sum of the last stage's losses, on all stages, whatever their dtype is there."""
    own = torch.stack(list(losses)).sum() if losses else torch.zeros(())
    total = own.detach().to(device=device, dtype=torch.float64)
    if pp is not None:
        dist.all_reduce(total, group=pp.get_group())
    return total


def largest_of_stages(own: float | None, pp: DeviceMesh | None) -> float | None:
    """The largest value of all stages, some of which may have none."""
    if pp is None:
        return own
    found = torch.tensor(-math.inf if own is None else own, device=pp.device_type)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=pp.get_group())
    return float(found) if math.isfinite(found) else None


def pp_of(trainer: Any) -> DeviceMesh | None:
    """The axis along which ranks have different stages of a trainer's model."""
    axis: DeviceMesh | None = trainer.parallel_dims.get_optional_mesh("pp")
    return axis


def of_all_stages(own: Mapping[str, T], pp: DeviceMesh | None) -> dict[str, T]:
    """The entries of all ranks of pp; a stage has the same ones on its other ranks."""
    if pp is None:
        return dict(own)
    found: list[Any] = [None] * pp.size()
    dist.all_gather_object(found, dict(own), group=pp.get_group())
    return {name: value for each in found for name, value in each.items()}
