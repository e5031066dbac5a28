"""A dry run: the whole Trainer of one rank, on a process group that no other rank joins.

torchtitan's `--comm.mode fake_backend`. Model, mesh, FSDP, data, forward, backward and optimizer
are those of a run on as many ranks as the mesh has; what others would have sent is whatever memory
holds, so losses and weights mean nothing, and none are kept.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

MODE = "fake_backend"


def is_dry(config: Any) -> bool:
    """Whether a config asks for a dry run."""
    return bool(config.comm.mode == MODE)


def made_dry(config: Any) -> Any:
    """The config without what a dry run leaves out: checkpoints, validation, logs.

    Raises:
        ValueError: what a dry run cannot do.
    """
    for refusal in _refusals(config):
        raise ValueError(refusal)
    return replace(
        config,
        checkpoint=replace(config.checkpoint, enable=False),
        validator=replace(config.validator, enable=False),
        metrics=replace(config.metrics, log_freq=1, enable_tensorboard=False, enable_wandb=False),
    )


def _refusals(config: Any) -> Iterator[str]:
    start, ep = config.checkpoint, config.parallelism.expert_parallel_degree
    pp = config.parallelism.pipeline_parallel_degree
    device, there = config.dtcp.device, torch.accelerator.is_available()
    mode = f"--comm.mode {MODE}"
    if config.dtcp.verify:
        yield (
            f"A dry run has no other ranks to compare with, got --dtcp.verify {config.dtcp.verify} "
            f"with {mode}: leave one of them out."
        )
    if start.create_seed_checkpoint:
        yield (
            f"A dry run reads and writes no weights, got --checkpoint.create_seed_checkpoint with "
            f"{mode}: leave one of them out."
        )
    if start.initial_load_path:
        yield (
            f"A dry run reads and writes no weights, got --checkpoint.initial_load_path "
            f"{start.initial_load_path} with {mode}: leave one of them out."
        )
    if ep != 1:
        yield (
            f"How many tokens an expert gets is known once ranks have exchanged it, got "
            f"--parallelism.expert_parallel_degree {ep} with {mode}: set it to 1."
        )
    if pp != 1:
        yield (
            f"A stage waits for what the one before it computes, got "
            f"--parallelism.pipeline_parallel_degree {pp} with {mode}: set it to 1."
        )
    if device == "cpu" and there:
        yield (
            f"A dry run is on the accelerator where there is one, got --dtcp.device cpu with "
            f"{mode}: hide it (CUDA_VISIBLE_DEVICES=)."
        )
    if device == "accelerator" and not there:
        yield (
            f"A dry run is on an accelerator of this machine, got --dtcp.device accelerator with "
            f"{mode} and none here: leave it out."
        )


def describe_dry(rank: int, world_size: int) -> str:
    """The line that a dry run prints about itself."""
    return (
        f"dry run     rank {rank} of {world_size}, and nobody answers it: losses mean nothing; no "
        f"checkpoint is read or written, nothing is validated or logged"
    )
