"""Turns a config of torchtitan into one of ours: its model, data and schedule, our attention.

python train.py --module llama3 --config llama3_debugmodel
    --parallelism.context_parallel_degree 4 --tokenizer.folder ... (and the rest as ever)
"""

import functools
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from dtcp.torchtitan.decoder_layers import with_mixers
from dtcp.torchtitan.loss import TokenLoss
from dtcp.torchtitan.parallelize import parallelize_decoder
from dtcp.torchtitan.stage_forwards import DECODER_STAGE
from dtcp.torchtitan.stages import pipeline_stages

from torchtitan import trainer as titan
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.validate import Validator
from torchtitan.config import ParallelismConfig
from torchtitan.config.override import derive
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.protocols.model_spec import ModelSpec

from dtcp.pretrain.checkpoint import Checkpoints
from dtcp.pretrain.progress import Progress
from dtcp.pretrain.trainer import Trainer
from dtcp.pretrain.validation import Validation


def adopt(config: titan.Trainer.Config) -> Trainer.Config:
    """Put our parts where torchtitan has its own; a config that is ours is returned as it is.

    Raises:
        ValueError: a model, a part or a setting that ours would not carry out.
    """
    if isinstance(config, Trainer.Config):
        return config
    if not isinstance(config, titan.Trainer.Config):
        raise ValueError(
            f"A config to run is one of torchtitan's trainer, got {_title(config)}: name another."
        )
    _check_parts(config)
    spec = config.model_spec
    # One that is adopted already keeps what its author has vouched for.
    adopted = spec is not None and spec.parallelize_fn is parallelize_decoder
    return derive(
        config,
        Trainer.Config,
        model_spec=spec if adopted else adopt_model(spec),
        parallelism=_without_stages(config.parallelism),
        training=replace(config.training, disable_cuda_graphs=True),
        checkpoint=derive(config.checkpoint, Checkpoints.Config),
        metrics=derive(config.metrics, Progress.Config),
        validator=derive(config.validator, Validation.Config),
        # The chunked one crashes on torch 2.11's CPU; ours works in chunks by itself.
        loss=TokenLoss.Config(),
    )


def _without_stages(parallelism: ParallelismConfig) -> ParallelismConfig:
    """Drop what torchtitan's configs say of pipeline stages, where the run has none."""
    reset = dict(_stage_settings(parallelism)) if parallelism.pipeline_parallel_degree == 1 else {}
    return replace(parallelism, spmd_backend="partial_dtensor", **reset)


def _stage_settings(parallelism: ParallelismConfig) -> Iterator[tuple[str, Any]]:
    """Settings of pipeline stages that differ from torchtitan's defaults, with these defaults."""
    for each in fields(parallelism):
        if each.name.startswith("pipeline_") and getattr(parallelism, each.name) != each.default:
            yield each.name, each.default


def adopt_model(spec: ModelSpec | None, *, per_token: Collection[type] = ()) -> ModelSpec:
    """The spec of a decoder of torchtitan with our attention, parallelized our way.

    What each layer asks of its attention (window, sinks, scale) is read and carried out.

    Args:
        per_token: classes of configs, not torchtitan's, whose modules treat every token alone.
    Raises:
        ValueError: a model, a layer or a field that is not read, or a function that is not called;
            named, with the reason.
    """
    if spec is None:
        raise ValueError(
            "Our attention goes into a model, got model_spec=None: name a config that has one."
        )
    _check_parallelize(spec)
    model = with_mixers(spec, per_token=per_token)
    own = spec.pipelining_fn is pipeline_llm
    stages = functools.partial(pipeline_stages, how=DECODER_STAGE) if own else None
    return replace(spec, model=model, parallelize_fn=parallelize_decoder, pipelining_fn=stages)


def _check_parallelize(spec: ModelSpec) -> None:
    """Refuse a user's own function, which ours would silently replace."""
    function = spec.parallelize_fn
    if function in (None, parallelize_decoder) or _is_titans(function):
        return
    own = getattr(function, "func", function)  # of a partial
    module, name = getattr(own, "__module__", ""), getattr(own, "__qualname__", repr(own))
    raise ValueError(
        f"Decoders are parallelized by dtcp (mixers, torchtitan's tp, recomputation, compile, "
        f"FSDP), got parallelize_fn={module}.{name} of {spec.name}, which nobody would call: set "
        f"it to None where it does no more than that, else write a config that returns "
        f"dtcp.pretrain.trainer.Trainer.Config."
    )


def _is_titans(function: Any) -> bool:
    """Whether a function is torchtitan's own: a wrapper has its name, and is another object."""
    module = getattr(function, "__module__", "")
    named = getattr(sys.modules.get(module), getattr(function, "__qualname__", ""), None)
    return module.startswith("torchtitan.") and named is function


def replaced_parts(config: titan.Trainer.Config) -> Iterator[str]:
    """What adopt replaces of torchtitan's, one line each."""
    if isinstance(config, Trainer.Config):
        return
    yield "attention: dtcp's, carried out as --dtcp.strategy and --dtcp.layout say"
    if config.parallelism.spmd_backend != "partial_dtensor":
        yield f"spmd_backend: {config.parallelism.spmd_backend} -> partial_dtensor"
    chunks = isinstance(config.loss, ChunkedLossWrapper.Config)
    yield (
        f"loss: {type(config.loss).__qualname__.removesuffix('.Config')}"
        + (f" of {config.loss.num_chunks} chunks" if chunks else "")
        + " -> TokenLoss, the same sum in chunks of its own"
    )
    if config.parallelism.pipeline_parallel_degree == 1:
        for name, default in _stage_settings(config.parallelism):
            yield f"{name}: {getattr(config.parallelism, name)} -> {default}, without stages"
    if not config.training.disable_cuda_graphs:
        yield "CUDA graphs: off, for lengths of documents change from batch to batch"


_REPLACED: Mapping[str, type] = {
    "checkpoint": CheckpointManager.Config,
    "metrics": MetricsProcessor.Config,
    "validator": Validator.Config,
}


def _check_parts(config: titan.Trainer.Config) -> None:
    """Refuse parts and settings that would be left behind."""
    known = {each.name for each in fields(Trainer.Config)}
    added = sorted(each.name for each in fields(config) if each.name not in known)
    if added:
        raise ValueError(
            f"Settings of torchtitan's own trainer are taken over, got {added} of "
            f"{_title(config)} besides: write a config that "
            f"returns dtcp.pretrain.trainer.Trainer.Config."
        )
    owner = config._owner
    if owner is not titan.Trainer:
        raise ValueError(
            f"The trainer that dtcp's stands for is torchtitan's own, got "
            f"{_title(owner)}, whose methods would be dropped: derive it from "
            f"dtcp.pretrain.trainer.Trainer, and return its Config."
        )
    for name, expected in _REPLACED.items():
        _check_type(name, getattr(config, name), expected)
    loss: Any = config.loss
    if isinstance(loss, ChunkedLossWrapper.Config):
        loss = loss.loss_fn
    _check_type("loss", loss, CrossEntropyLoss.Config)


def _check_type(name: str, part: Any, expected: type) -> None:
    if type(part) is not expected:
        raise ValueError(
            f"The {name} that dtcp replaces is torchtitan's {expected.__qualname__}, got "
            f"{_title(part)}, which would be dropped: write a "
            f"config that returns dtcp.pretrain.trainer.Trainer.Config."
        )


def _title(part: Any) -> str:
    kind = part if isinstance(part, type) else type(part)
    return f"{kind.__module__}.{kind.__qualname__}"
