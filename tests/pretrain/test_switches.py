"""C2: an option that is named below a switch that is off is refused, and one below none is not."""

from dtcp.torchtitan import settings

import pytest

from dtcp.pretrain.configs import llama_tiny
from dtcp.pretrain.options import parse
from dtcp.pretrain.switches import BELOW, check_switched_on, setting, settings_of

ALONE = (
    "training.enable_cpu_offload",
    "parallelism.enable_fsdp_symm_mem",
    "parallelism.enable_sequence_parallel",
    "compile.enable_async_tensor_parallel",
    "checkpoint.enable_first_step_checkpoint",
    "debug.enable_structured_logging",
)
"""Switches that no other setting is about."""

REFUSED = {
    ("--profiler.profile_freq", "5"): r"profiler.profile_freq=5 with profiler.enable_profiling="
    r"False and profiler.enable_memory_snapshot=False",
    ("--profiler.profiler-active", "1"): r"profiler_active=1 with profiler.enable_profiling=False",
    ("--metrics.no-enable-tensorboard", "--metrics.save_tb_folder", "x"): r"save_tb_folder='x' with"
    r" metrics.enable_tensorboard=False and metrics.enable_wandb=False",
    ("--validator.no-enable", "--validator.freq", "40"): r"freq=40 with validator.enable=False",
    ("--validator.no-enable", "--validator.dataloader.seed=1"): r"dataloader.seed=1 with validator",
    ("--checkpoint.no-enable", "--checkpoint.interval=9"): r"interval=9 with checkpoint.enable=",
    ("--checkpoint.load_only", "--checkpoint.keep_latest_k=3"): r"keep_latest_k=3 with checkpoint"
    r".load_only=True",
    ("--checkpoint.initial_load_model_only",): r"model_only=True with checkpoint.initial_load_path="
    r"None and checkpoint.initial_load_in_hf=False",
    ("--compile.no-enable", "--compile.backend=eager"): r"backend='eager' with compile.enable=",
    ("--lr_scheduler.decay_ratio=0", "--lr_scheduler.decay_type=sqrt"): r"'sqrt' with .*ratio=0",
    ("--debug.deterministic_warn_only",): r"warn_only=True with debug.deterministic=False",
    ("--comm.save_traces_folder", "x"): r"save_traces_folder='x' with comm.trace_buf_size=0",
}

TAKEN = (
    ("--profiler.profile_freq", "5", "--profiler.enable_profiling"),
    ("--profiler.no-enable-profiling", "--profiler.no-enable-memory-snapshot"),
    ("--checkpoint.no-enable", "--checkpoint.no-export-hf"),
    ("--checkpoint.no-load-only", "--checkpoint.interval", "3"),
    ("--lr_scheduler.decay_type", "sqrt"),
    ("--compile.no-enable", "--validator.no-enable", "--metrics.no-enable_tensorboard"),
)


@pytest.mark.parametrize("options", REFUSED, ids=" ".join)
def test_C2_an_option_below_a_switch_that_is_off_is_refused(options):
    with pytest.raises(ValueError, match=REFUSED[options]):
        parse([*options])


@pytest.mark.parametrize("options", TAKEN, ids=" ".join)
def test_C2_an_option_below_a_switch_that_is_on_is_taken(options):
    parse([*options])


def test_C2_what_a_config_has_ready_for_a_switch_that_is_off_stays():
    config = llama_tiny()
    config.compile.enable = config.checkpoint.enable = config.validator.enable = False
    check_switched_on(config, {"training.steps"})


def test_C2_every_switch_says_what_is_below_it():
    known = dict(settings_of(llama_tiny())).keys()
    for switches, below in BELOW.items():
        assert {setting(x) for x in switches} <= known
        assert all(any(x.startswith(name) for x in known) for name in below)
    switches = {x for several in BELOW for x in several} | {*ALONE}
    for section, table in settings.SECTIONS.items():
        named = {f"{section}.{x}" for x in table if x.startswith("enable")}
        assert named <= switches, f"{named - switches}: what is below it?"
