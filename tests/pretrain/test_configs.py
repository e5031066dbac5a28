"""Configs and the command line: what can start, and what is refused before any rank does."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from dtcp.torchtitan.attention import MixerAttention

import pytest
import torch
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import models
from torchtitan.models.llama3.config_registry import llama3_debugmodel

from dtcp.pretrain import configs, output_folder
from dtcp.pretrain.adopt import adopt, adopt_model
from dtcp.pretrain.launch import check_world, ranks_for
from dtcp.pretrain.options import config_names, parse
from dtcp.pretrain.run import _what_next
from dtcp.pretrain.trainer import Trainer
from dtcp.pretrain.without_effect import check_effects

CONFIGS = config_names(configs)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_one_that_can_start(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("texts", "Llama-3.1-8B"):
        Path(folder).mkdir()
    HubTokenizer(models.BPE()).save("Llama-3.1-8B/tokenizer.json")
    Path("Llama-3.1-8B/model.safetensors").touch()
    # As many documents as leave some for validation.
    for number in range(400):
        Path(f"texts/{number}.txt").write_text(f"{number}")
    # A checkpoint of 8 billion parameters takes more than this machine may have.
    terabyte = SimpleNamespace(free=1 << 40)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: terabyte)
    config = getattr(configs, name)()
    assert isinstance(config, Trainer.Config) and getattr(configs, name).__doc__
    config.check()
    assert config.dump_folder == f"outputs/{name}"
    world = ranks_for(config.parallelism, "cpu").count
    check_world(config.parallelism, world)


def test_the_default_config_is_cp_2_x_tp_2_on_four_ranks():
    config = parse([])
    assert config.parallelism.context_parallel_degree == 2
    assert config.parallelism.tensor_parallel_degree == 2
    assert ranks_for(config.parallelism, "cpu").count == 4
    assert config.compile.enable


def test_options_change_a_config():
    config = parse(["--config=llama_tiny", "--dtcp.strategy", "ulysses", "--training.steps", "7"])
    assert config.dtcp.strategy == "ulysses" and config.training.steps == 7


MISTAKES = [
    (["--config", "lama_tiny"], "did you mean llama_tiny"),
    (["--module", "nowhere"], "--module nowhere: check the name"),
    (["--module", ""], "--module : check the name"),
    (["--config", "replace"], "got --config replace with"),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES)
def test_an_unknown_config_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        parse(arguments)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--dataloader.dataset", "folder"], "dataset_path=None: no such folder"),
        (["--tokenizer.folder", "/nowhere"], "--tokenizer.folder /nowhere: no such folder"),
        (["--checkpoint.initial_load_path", "/nowhere"], "initial_load_path /nowhere: no such"),
        (["--parallelism.spmd_backend", "full_dtensor"], "choose spmd_types or partial_dtensor"),
        (
            ["--config", "gemma4_tiny", "--parallelism.pipeline_parallel_degree", "2"],
            "gemma4 are not",
        ),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_ranks_start(option, says):
    with pytest.raises(ValueError, match=says):
        parse(option).check()


def test_help_says_how_to_choose_a_config_and_a_model(capsys):
    """torchtitan's parser takes these options before it looks at any other."""
    with pytest.raises(SystemExit, match="0"):
        parse(["--config", "gemma4_tiny", "--help"])
    printed = capsys.readouterr().out
    for option in ("--config", "--module", "--model.hf", "--model.dtcp"):
        assert f"\n  {option}" in printed
    assert all(name in printed for name in CONFIGS) and "in config gemma4_tiny" in printed


def test_a_world_that_the_mesh_does_not_fill_is_refused():
    mesh = configs.llama_tiny().parallelism
    check_world(mesh, 8)
    with pytest.raises(ValueError, match=r"cp 2 x tp 2 .* world_size=6: start a multiple of 4"):
        check_world(mesh, 6)
    with pytest.raises(ValueError, match="world_size=8: start 4 ranks"):
        check_world(replace(mesh, data_parallel_shard_degree=1), 8)
    with pytest.raises(ValueError, match=r"got world_size=0"):
        check_world(mesh, 0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_accelerators_that_are_not_there_are_refused_before_ranks_start():
    mesh = configs.llama_tiny().parallelism
    with pytest.raises(ValueError, match=r"got --dtcp.device accelerator where it finds none"):
        ranks_for(mesh, "accelerator")


def test_a_config_of_torchtitan_is_adopted_with_our_attention():
    config = adopt(llama3_debugmodel())
    assert isinstance(config, Trainer.Config) and adopt(config) is config
    assert config.parallelism.spmd_backend == "partial_dtensor"
    assert all(
        isinstance(layer.attention.inner_attention, MixerAttention.Config)
        for layer in config.model_spec.model.layers
    )


def test_a_model_that_is_no_decoder_is_not_adopted():
    with pytest.raises(ValueError, match="model_spec=None"):
        adopt_model(None)


def test_a_run_that_is_done_goes_on_from_whole_checkpoints_alone():
    config = configs.llama_tiny()
    assert "--training.steps 240 goes on from here" in _what_next(config)
    for name, value in (("enable", False), ("load_only", True), ("last_save_model_only", True)):
        other = replace(config, checkpoint=replace(config.checkpoint, **{name: value}))
        assert "goes on" not in _what_next(other), name


@pytest.mark.parametrize("option", ["--dump_folder", "--dump-folder"])
def test_a_model_in_the_place_of_a_config_runs_in_the_folder_that_is_named(option, tmp_path):
    named = [option, str(tmp_path)]
    for model in ("--model.dtcp", "--model.hf"):
        assert parse([model, "llama", *named]).dump_folder == str(tmp_path)
    assert parse(["--model.dtcp", "llama"]).dump_folder == "outputs/llama"
    assert parse(["--model.hf", "llama"]).dump_folder == "outputs/hf_llama"


def test_a_dtype_of_exports_is_refused_where_it_is_named_and_nothing_is_exported():
    """torchtitan's configs of Qwen3 have one and no export, for runs that ask for some."""
    qwen3 = ["--module", "qwen3", "--config", "qwen3_1_7b"]
    check_effects(parse(qwen3))
    exported = [*qwen3, "--checkpoint.enable", "--checkpoint.export_hf"]
    assert parse(exported).checkpoint.export_dtype == "float16"
    with pytest.raises(ValueError, match=r"checkpoint.export_dtype='bfloat16' with checkpoint.ena"):
        check_effects(parse([*qwen3, "--checkpoint.export_dtype", "bfloat16"]))
