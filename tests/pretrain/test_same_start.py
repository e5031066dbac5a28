"""Ranks started with other settings, code, data or folders are refused on all of them."""

import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

from dtcp.torchtitan import compat as compat

import pytest
from torch import distributed as dist

from dtcp.pretrain import configs, same_start
from dtcp.pretrain.config_record import config_changes, config_record
from dtcp.pretrain.data import PackedDocuments
from dtcp.pretrain.folder_lock import FolderLock
from dtcp.pretrain.same_start import (
    files_of_code,
    refuse_other_code,
    refuse_other_data,
    refuse_other_folder,
    refuse_other_nodes,
    refuse_other_settings,
    refuse_other_weights,
)
from dtcp.pretrain.trainer import Trainer
from tests.harness.run_script import ROOT
from tests.harness.spmd import run_ranks, spmd
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


@spmd(ranks=2)
def test_never_silent_a_rank_that_runs_other_code(mesh):
    refuse_other_code()
    own = {"torch": f"2.{dist.get_rank()}", "dtcp": "of sha256 0"}
    said = r"same code, got .* on rank 1: torch 2.0 -> 2.1: install"
    with (
        mock.patch.object(same_start, "_code", return_value=own),
        pytest.raises(ValueError, match=said),
    ):
        refuse_other_code()


def test_all_of_the_code_is_compared_and_each_file_once():
    """A checkout has links to models and to parallelize, which no recursive search goes into."""
    root = Path(same_start.__file__).parents[1]
    names = [str(file.relative_to(root)) for file in files_of_code(root)]
    assert {"parallelize/plans/huggingface.py", "models/gemma4/model.py", "mixer.py"} <= {*names}
    assert len(names) == len({*names})


@spmd(ranks=2)
def test_never_silent_machines_with_unequal_numbers_of_ranks(mesh):
    """Rank 0 has a machine for itself: the groups of two tiers would not be the same everywhere."""
    parallelism, each = configs.llama_tiny_fsdp4().parallelism, 1 + dist.get_rank()
    refuse_other_nodes(parallelism, each)  # nothing is exchanged in two tiers
    for axis in ("context", "expert"):
        across = replace(parallelism, **{f"{axis}_parallel_degree": 2})
        refuse_other_nodes(across, 2)
        with pytest.raises(
            ValueError, match=r"on rank 1: ranks of a machine 1 -> 2: start as many"
        ):
            refuse_other_nodes(across, each)


def start_from(mesh, folder: str) -> None:
    own = Path(folder, str(dist.get_rank()))
    own.mkdir()
    (own / "model.safetensors").write_bytes(b"7" * 9000)
    (own / "notes.txt").write_text(own.name)
    refuse_other_weights(own)
    (own / "model.safetensors").write_bytes(own.name.encode() * 9000)
    with pytest.raises(ValueError, match=r"on rank 1: changed: model.safetensors: bring the same"):
        refuse_other_weights(own)


def test_never_silent_hosts_whose_weights_to_start_from_are_others(tmp_path):
    run_ranks(start_from, 2, str(tmp_path))


def save_into(mesh, folder: str) -> None:
    rank = dist.get_rank()
    lock = None if rank else FolderLock(Path(folder))
    dist.barrier()
    refuse_other_folder(Path(folder))
    own = Path(folder, "elsewhere") if rank else Path(folder)
    with (
        mock.patch.object(same_start, "PAUSE", 0.0),
        pytest.raises(ValueError, match=r"in which rank 1 on \S+ cannot see run.lock"),
    ):
        refuse_other_folder(own)
    if lock is not None:
        lock.release()


def test_never_silent_hosts_that_would_save_into_folders_of_their_own(tmp_path):
    run_ranks(save_into, 2, str(tmp_path))


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


def validated_on_copies() -> Trainer.Config:
    """Two ranks that train on the same data, and look for the same where each validates."""
    config = configs.llama_tiny_fsdp4()
    name = ("docs", "models")[int(os.environ["RANK"])]
    config.validator.dataloader = PackedDocuments.Config(
        dataset="folder", dataset_path=str(ROOT / name), part="all"
    )
    return config


def test_never_silent_ranks_that_validate_on_other_data(tmp_path):
    arguments = ("--dump_folder", str(tmp_path), "--parallelism.data_parallel_shard_degree", "2")
    start = {"module": "tests.pretrain.test_same_start", "config": "validated_on_copies"}
    code, output = train(*arguments, **start)
    assert code and "have the same data, got others than rank 0's on rank 1: added: " in output


def test_a_setting_that_is_a_function_has_not_changed_in_another_process():
    record = config_record(configs.titan_llama3_tiny())
    name = "model_spec.model.lm_head.param_init.bias"
    assert not [text for text in record.values() if " at 0x" in text]
    assert config_changes(record | {name: "<function zeros_ at 0x7f52883a1a80>"}, record) == []
