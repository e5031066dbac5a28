"""Refuses options of the command line under a switch that is off: nothing would read them.

A config may keep values for what it leaves off. What a user names on the command line is meant for
this run.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

BELOW: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("profiler.enable_profiling",): (
        "profiler.save_traces_folder",
        "profiler.profiler_repeat",
        "profiler.profiler_skip_first",
        "profiler.profiler_skip_first_wait",
        "profiler.profiler_active",
        "profiler.profiler_warmup",
    ),
    ("profiler.enable_profiling", "profiler.enable_memory_snapshot"): ("profiler.profile_freq",),
    ("profiler.enable_memory_snapshot",): (
        "profiler.memory_snapshot_freq",
        "profiler.save_memory_snapshot_folder",
        "profiler.memory_snapshot_max_entries",
    ),
    ("metrics.enable_tensorboard", "metrics.enable_wandb"): (
        "metrics.save_tb_folder",
        "metrics.save_for_all_ranks",
    ),
    ("validator.enable",): ("validator.freq", "validator.steps", "validator.dataloader."),
    ("checkpoint.enable",): ("checkpoint.", "dataloader.accept_changes"),
    ("checkpoint.no_load_only",): (
        "checkpoint.interval",
        "checkpoint.keep_latest_k",
        "checkpoint.async_mode",
        "checkpoint.last_save_model_only",
    ),
    ("checkpoint.initial_load_path", "checkpoint.initial_load_in_hf"): (
        "checkpoint.initial_load_model_only",
    ),
    ("compile.enable",): ("compile.components", "compile.backend"),
    ("lr_scheduler.decay_ratio",): ("lr_scheduler.decay_type", "lr_scheduler.min_lr_factor"),
    ("debug.deterministic",): ("debug.deterministic_warn_only",),
    ("comm.trace_buf_size",): ("comm.save_traces_folder", "comm.save_traces_file_prefix"),
}
"""By switches, any of which is enough: settings that are only read with one of them on.

A trailing dot stands for a section; `no_` in the name of a switch, as on the command line, for one
that has to be off."""

ON_BY_DEFAULT = ("lr_scheduler.decay_ratio",)
"""Numbers that are on when they are None."""


def check_switched_on(config: Any, named: Collection[str]) -> None:
    """Refuse options of the command line that a switch leaves without effect.

    Args:
        config: a `Trainer.Config` after the command line.
        named: the options, as `named_options` gives them.
    Raises:
        ValueError: naming the option, its value and the switches.
    """
    values = dict(settings_of(config))
    for switches, below in BELOW.items():
        if any(_is_on(switch, values[setting(switch)]) for switch in switches):
            continue
        off = " and ".join(f"{x}={values[x]!r}" for x in map(setting, switches))
        for name in sorted(values.keys() & set(named) - {*switches}):
            # A switch that is off as well leaves nothing undone.
            if name.startswith(below) and values[name] is not False:
                raise ValueError(
                    f"A setting is of what is switched on, got {name}={values[name]!r} with {off}: "
                    f"change one of them."
                )


def settings_of(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a config's sections by its name on the command line, with its value."""
    for each in fields(config):
        value, name = getattr(config, each.name), f"{path}{each.name}"
        yield name, value
        if is_dataclass(value):
            yield from settings_of(value, f"{name}.")


def setting(switch: str) -> str:
    """What a switch sets, whichever way it is on."""
    return switch.replace(".no_", ".")


def _is_on(switch: str, value: Any) -> bool:
    if switch in ON_BY_DEFAULT:
        return bool(value is None or value > 0)
    return bool(value) == (switch == setting(switch))
