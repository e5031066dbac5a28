"""Ranks that were started with other settings, or on other data, are refused on all of them."""

import os

from dtcp.torchtitan import compat as compat

import pytest
from torch import distributed as dist

from dtcp.pretrain import configs
from dtcp.pretrain.config_record import config_changes, config_record
from dtcp.pretrain.data import PackedDocuments
from dtcp.pretrain.same_start import refuse_other_data, refuse_other_settings
from dtcp.pretrain.trainer import Trainer
from tests.harness.run_script import ROOT
from tests.harness.spmd import spmd
from tests.harness.train_run import train

OTHER = {
    "seed": (("debug", "seed"), 5, "debug.seed 0 -> 5"),
    "schedule": (("lr_scheduler", "warmup_steps"), 1, "lr_scheduler.warmup_steps 10 -> 1"),
    "steps": (("training", "steps"), 6, "training.steps 120 -> 6"),
    "interval": (("checkpoint", "interval"), 3, "checkpoint.interval 40 -> 3"),
}


@pytest.mark.parametrize("case", OTHER)
@spmd(ranks=2)
def test_never_silent_a_rank_with_a_setting_of_its_own(mesh, case):
    (section, name), value, said = OTHER[case]
    config = configs.llama_tiny()
    if dist.get_rank():
        setattr(getattr(config, section), name, value)
    with pytest.raises(ValueError, match=f"same settings, got .* on rank 1: {said}: start all"):
        refuse_other_settings(config)


@spmd(ranks=2)
def test_ranks_that_keep_things_in_other_places_are_alike(mesh):
    config = configs.titan_llama3_tiny()
    if dist.get_rank():
        config.dump_folder = config.tokenizer.folder = "elsewhere"
        config.dataloader.dataset_path = config.hf_assets_path = "elsewhere"
        config.metrics.enable_wandb = config.profiler.enable_profiling = True
    # A dataset of Hugging Face by its folder, another one on each host.
    config.dataloader.dataset = str(ROOT / ("docs", "models")[dist.get_rank() % 2])
    refuse_other_settings(config)
    notes = {".cache/a.txt.metadata": f"{dist.get_rank()}-0"}
    folder = config.dataloader.dataset
    refuse_other_data({"dataset": folder, "files": {"a.txt": "12-0", **notes}, "seed": 0})


@spmd(ranks=4)
def test_never_silent_ranks_with_other_data(mesh):
    files = {"a.txt": "12-0"} | ({"b.txt": "9-7"} if dist.get_rank() % 2 else {})
    said = r"rank 1: added: b.txt \| rank 3: added: b.txt: bring the same data"
    with pytest.raises(ValueError, match=said):
        refuse_other_data({"files": files, "seed": 0})
    refuse_other_data({"files": {}, "seed": 0})


def copies() -> Trainer.Config:
    """A row for each of two ranks, which find other documents where both look for the same."""
    config = configs.llama_tiny_fsdp4()
    name = ("docs", "models")[int(os.environ["RANK"])]
    config.dataloader = PackedDocuments.Config(dataset="folder", dataset_path=str(ROOT / name))
    config.validator.enable = False
    return config


def test_never_silent_ranks_of_dp_that_read_other_data(tmp_path):
    """Ranks that share rows compare them; these share none."""
    arguments = ("--dump_folder", str(tmp_path), "--parallelism.data_parallel_shard_degree", "2")
    code, output = train(*arguments, module="tests.pretrain.test_same_start", config="copies")
    assert code and "have the same data, got others than rank 0's on rank 1: added: " in output


def test_a_setting_that_is_a_function_has_not_changed_in_another_process():
    record = config_record(configs.titan_llama3_tiny())
    name = "model_spec.model.lm_head.param_init.bias"
    assert not [text for text in record.values() if " at 0x" in text]
    assert config_changes(record | {name: "<function zeros_ at 0x7f52883a1a80>"}, record) == []
