"""Settings that cannot work are refused before any rank starts."""

import re
from dataclasses import replace
from typing import Any

import pytest

from dtcp.pretrain.configs import llama_tiny
from dtcp.pretrain.options import parse
from tests.harness.work import calls_of

REFUSED = {
    "steps": ("training.steps", 0, "--training.steps 0"),
    "rows": ("training.local_batch_size", -1, "--training.local_batch_size -1"),
    "tokens": ("training.seq_len", 0, "--training.seq_len 0"),
    "uneven_tokens": (
        "training.seq_len",
        1022,
        "--training.seq_len 1022: give a multiple, as 1024",
    ),
    "part_of_a_step": ("training.global_batch_size", 6, "--training.global_batch_size 6"),
    "no_rows": ("training.global_batch_size", 0, "--training.global_batch_size 0"),
    "log": ("metrics.log_freq", 0, "--metrics.log_freq 0"),
    "validation": ("validator.freq", 0, "--validator.freq 0"),
    "collection": ("training.gc_freq", 0, "--training.gc_freq 0"),
    "timeout": ("comm.train_timeout_seconds", 0, "--comm.train_timeout_seconds 0"),
    "start": ("comm.init_timeout_seconds", -5, "--comm.init_timeout_seconds -5"),
    "restarts": ("dtcp.max_restarts", -1, "--dtcp.max_restarts -1"),
    "stop": ("dtcp.stop_seconds", 0, "--dtcp.stop_seconds 0"),
    "load": ("checkpoint.load_step", -2, "--checkpoint.load_step -2"),
    "norm": ("training.max_norm", float("nan"), "--training.max_norm nan"),
    "schedule": (
        "lr_scheduler.total_steps",
        7,
        "--lr_scheduler.total_steps 7 for --training.steps",
    ),
    "rows_of_a_step": ("training.global_batch_size", -8, "--training.global_batch_size -8"),
    "warmup": ("lr_scheduler.warmup_steps", -1, "--lr_scheduler.warmup_steps -1"),
    "decay": ("lr_scheduler.decay_ratio", -0.5, "--lr_scheduler.decay_ratio -0.5"),
    "least_rate": ("lr_scheduler.min_lr_factor", -0.1, "--lr_scheduler.min_lr_factor -0.1"),
    "no_rate": ("lr_scheduler.min_lr_factor", float("nan"), "--lr_scheduler.min_lr_factor nan"),
    "tokenizer": ("tokenizer.folder", "/nowhere", "--tokenizer.folder /nowhere"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_survive_E9_an_impossible_setting_is_told_at_the_start(kind):
    option, value, said = REFUSED[kind]
    config: Any = llama_tiny()
    *path, name = option.split(".")
    section = config
    for part in path:
        section = getattr(section, part)
    setattr(section, name, value)
    with pytest.raises(ValueError, match=re.escape(said)):
        config.check()


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0])
def test_survive_E9_a_learning_rate_is_a_number(rate):
    config = llama_tiny()
    config.optimizer.param_groups[0].optimizer_kwargs["lr"] = rate
    with pytest.raises(ValueError, match=f"lr={rate}"):
        config.check()


def test_survive_E9_a_profile_fits_into_its_cycle():
    config = llama_tiny()
    config.profiler = replace(config.profiler, profile_freq=2)
    config.check()
    config.profiler = replace(config.profiler, enable_profiling=True)
    with pytest.raises(ValueError, match=r"profile_freq 2 with --profiler.profiler_warmup 3"):
        config.check()


def test_survive_checks_at_the_start_take_little():
    """0.3 s of a core are promised, beyond the imports: they make some 150,000 calls, in 0.03 s."""
    config = parse(["--training.steps", "4"])
    config.check()
    assert 0 < calls_of(config.check) < 1_000_000
