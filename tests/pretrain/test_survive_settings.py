"""Settings that cannot work are refused before any rank starts."""

import re
from dataclasses import replace
from typing import Any

import pytest

from dtcp.pretrain.config_check import check_heads, check_on_ranks
from dtcp.pretrain.configs import deepseek_v4_tiny, llama_tiny
from dtcp.pretrain.options import parse
from dtcp.pretrain.run import run
from dtcp.pretrain.start_weights import check_start
from dtcp.pretrain.tokenizer import Tokenizer
from tests.harness.work import calls_of

REFUSED = {
    "steps": ("training.steps", 0, "--training.steps 0"),
    **{
        name: (f"parallelism.{name}_degree", 0, f"--parallelism.{name}_degree 0: give 1")
        for name in (
            *("data_parallel_replicate", "data_parallel_shard", "context_parallel"),
            *("tensor_parallel", "expert_parallel"),
        )
    },
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
    "log_folder": ("metrics.save_tb_folder", "/proc/x", "another --metrics.save_tb_folder"),
    "home": ("dump_folder", "~/run", "--dump_folder '~/run'"),
    "config_file": ("debug.save_config_file", "", "--debug.save_config_file ''"),
    "not_loaded": (
        "checkpoint.exclude_from_loading",
        ["optimizr", "dataloader"],
        "--checkpoint.exclude_from_loading optimizr:",
    ),
    "no_folder": ("dump_folder", " ", "--dump_folder ' '"),
    "folder_elsewhere": ("checkpoint.folder", "/elsewhere", "--checkpoint.folder /elsewhere"),
    "folder_above": ("checkpoint.folder", "a/../..", "--checkpoint.folder a/../.."),
    "folder_itself": ("checkpoint.folder", ".", "--checkpoint.folder .:"),
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


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -0.1])
def test_survive_E9_a_weight_of_a_loss_is_a_number(weight):
    config: Any = deepseek_v4_tiny()
    config.loss.mtp_weight = weight
    with pytest.raises(ValueError, match=f"--loss.mtp_weight {weight}"):
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


def test_survive_E9_rows_of_a_validation_are_dealt_out_among_those_of_a_step():
    config: Any = llama_tiny()
    config.validator.dataloader.balance_rows = 2
    with pytest.raises(ValueError, match=r"balance_rows=2 for 4 rows"):
        check_on_ranks(config, 4)
    config.validator.enable = False
    check_on_ranks(config, 4)


@pytest.mark.parametrize(
    ("axis", "degree", "said"),
    [
        ("context_parallel", 4, "dtcp.ulysses_degree=3 with parallelism.context_parallel_degree=4"),
        ("tensor_parallel", 3, "got num_heads=8 with tp=3"),
    ],
)
def test_survive_E9_degrees_that_cut_heads_are_told_before_ranks_start(axis, degree, said):
    config: Any = llama_tiny()
    config.dtcp.strategy, config.dtcp.ulysses_degree = "hybrid", 3
    for name, size in {"context_parallel": 3, "tensor_parallel": 1, axis: degree}.items():
        setattr(config.parallelism, f"{name}_degree", size)
    with pytest.raises(ValueError, match=re.escape(said)):
        check_heads(config)
    setattr(config.parallelism, f"{axis}_degree", 1)
    check_heads(config)


def test_survive_E9_weights_go_with_the_ids_of_their_tokenizer(tmp_path):
    """Of a byte a token a pretrained model would learn anew, and its loss would only be high."""
    config: Any = llama_tiny()
    (tmp_path / "model.safetensors").touch()
    weights = {"initial_load_path": str(tmp_path), "initial_load_in_hf": True}
    config.checkpoint = replace(config.checkpoint, **weights, initial_load_model_only=True)
    check_start(config)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"add --tokenizer.folder {tmp_path}"):
        check_start(config)
    config.tokenizer = Tokenizer.Config(folder=str(tmp_path))
    check_start(config)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "4"}, "got RANK='' and WORLD_SIZE='4'"),
        ({"WORLD_SIZE": "", "RANK": "0"}, "got RANK='0' and WORLD_SIZE=''"),
    ],
)
def test_survive_E9_a_rank_that_is_named_by_half_is_told_how(
    environment, said, monkeypatch, capsys
):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="1"):
        run(["--training.steps", "1"], command=())
    assert said in capsys.readouterr().err
