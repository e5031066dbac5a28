"""Settings that cannot work, refused before any rank starts."""

import math
from collections.abc import Iterator
from typing import Any

from dtcp.torchtitan import compat as compat

from torchtitan.config import ParallelismConfig


def check_counts(config: Any) -> None:
    """Refuse counts that no run can have, and batches that do not divide over the mesh.

    Raises:
        ValueError: naming the setting, its value and what would work.
    """
    for name, value, least in _counts(config):
        if value < least:
            raise ValueError(
                f"A run counts from {least} on, got --{name} {value}: give {least} or more."
            )
    seed = config.debug.seed
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(
            f"A seed has 64 bits, got --debug.seed {seed}: give one from 0 to 2**64 - 1."
        )
    shards = config.parallelism.data_parallel_shard_degree
    if shards < 1 and shards != -1:
        raise ValueError(
            f"An axis has ranks, or those that are left, got "
            f"--parallelism.data_parallel_shard_degree {shards}: give 1 or more, or -1."
        )
    replicas = config.parallelism.data_parallel_replicate_degree * max(shards, 1)
    check_whole_parts(config.training, replicas)
    _check_seq_len(config.training.seq_len, config.parallelism)


def _counts(config: Any) -> Iterator[tuple[str, float, float]]:
    """Each count by its option, with the least that works."""
    training, section = config.training, config.dtcp
    yield "training.steps", training.steps, 1
    for name in (
        "data_parallel_replicate",
        "context_parallel",
        "tensor_parallel",
        "expert_parallel",
    ):
        yield f"parallelism.{name}_degree", getattr(config.parallelism, f"{name}_degree"), 1
    yield "training.local_batch_size", training.local_batch_size, 1
    yield "training.seq_len", training.seq_len, 1
    yield "training.gc_freq", training.gc_freq, 1
    yield "metrics.log_freq", config.metrics.log_freq, 1
    yield "comm.init_timeout_seconds", config.comm.init_timeout_seconds, 1
    yield "comm.train_timeout_seconds", config.comm.train_timeout_seconds, 1
    yield "dtcp.max_restarts", section.max_restarts, 0
    yield "dtcp.stop_seconds", section.stop_seconds, 1
    yield "dtcp.verify", section.verify, 0
    yield "checkpoint.load_step", config.checkpoint.load_step, -1
    yield "lr_scheduler.warmup_steps", config.lr_scheduler.warmup_steps, 0
    yield "training.global_batch_size", config.training.global_batch_size, -1
    if config.validator.enable:
        yield "validator.freq", config.validator.freq, 1


def check_whole_parts(training: Any, replicas: int) -> int:
    """Refuse a step that is not a whole number of micro-batches of all replicas.

    Returns:
        the rows of a part, on all ranks.
    """
    rows, part = training.global_batch_size, training.local_batch_size * replicas
    # Negative is torchtitan's sign for one part per step.
    if rows == 0 or (rows > 0 and rows % part):
        raise ValueError(
            f"A step is made of whole micro-batches, got --training.global_batch_size {rows} with "
            f"{part} rows in a micro-batch of all ranks (--training.local_batch_size "
            f"{training.local_batch_size}): give a multiple of {part}."
        )
    return part


def _check_seq_len(seq_len: int, parallelism: ParallelismConfig) -> None:
    """torchtitan cuts a row into two parts per cp rank, and these again over tp."""
    cp, tp = parallelism.context_parallel_degree, parallelism.tensor_parallel_degree
    parts = (tp if parallelism.enable_sequence_parallel else 1) * (2 * cp if cp > 1 else 1)
    if parts > 0 and seq_len % parts:
        near = max(1, round(seq_len / parts)) * parts
        raise ValueError(
            f"A row is cut into {parts} parts by cp {cp} and tp {tp}, got --training.seq_len "
            f"{seq_len}: give a multiple, as {near}."
        )


def check_optimizer(config: Any) -> None:
    """Refuse numbers that are not finite or cannot be stepped by, and a schedule that ends early.

    Raises:
        ValueError: naming the parameter.
    """
    for group in config.optimizer.param_groups:
        for name, value in group.optimizer_kwargs.items():
            if isinstance(value, float) and (not math.isfinite(value) or value < 0):
                raise ValueError(
                    f"The optimizer's numbers are finite and not negative, got {name}={value}: "
                    f"give another."
                )
    _check_schedule(config.lr_scheduler, config.training.steps)
    weight = getattr(config.loss, "mtp_weight", 0.0)
    if not 0 <= weight < math.inf:
        raise ValueError(
            f"A loss has a weight that is finite and not negative, got --loss.mtp_weight {weight}: "
            f"give another."
        )
    norm = config.training.max_norm
    if math.isnan(norm) or norm <= 0:
        raise ValueError(
            f"Gradients are clipped to a positive norm, got --training.max_norm {norm}: give a "
            f"positive number, or inf to leave them alone."
        )


def _check_schedule(schedule: Any, steps: int) -> None:
    """Refuse ratios outside of 0 to 1: learning rates would fall below zero, or never decay."""
    for name in ("decay_ratio", "min_lr_factor"):
        value = getattr(schedule, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(
                f"A schedule of learning rates is made of parts from 0 to 1, got "
                f"--lr_scheduler.{name} {value}: give another."
            )
    total = schedule.total_steps
    if total is not None and total < steps:
        # Beyond its end torchtitan's schedule goes below zero, or fails.
        raise ValueError(
            f"A schedule of learning rates has all steps of a run, got --lr_scheduler.total_steps "
            f"{total} for --training.steps {steps}: give {steps} or more."
        )


def check_profiler(profiler: Any) -> None:
    """Refuse a profiler cycle that is shorter than its warmup and active steps.

    Raises:
        ValueError: naming the steps.
    """
    if not profiler.enable_profiling:
        return
    cycle, warmup = profiler.profile_freq, profiler.profiler_warmup
    active = profiler.profiler_active
    if warmup < 0 or active < 1 or cycle < warmup + active:
        raise ValueError(
            f"A profile is taken of the last steps of a cycle, behind those of a warmup, got "
            f"--profiler.profile_freq {cycle} with --profiler.profiler_warmup {warmup} and "
            f"--profiler.profiler_active {active}: give a cycle of their sum or more."
        )
