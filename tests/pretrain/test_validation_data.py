"""A validation reads what is held out of the data that is trained on, unless others are named."""

import zlib
from types import SimpleNamespace

import pytest
import torch

from dtcp.pretrain import configs
from dtcp.pretrain.data import PackedDocuments
from dtcp.pretrain.options import parse
from dtcp.pretrain.sources import HELD_OUT
from dtcp.pretrain.text_files import DataError
from dtcp.pretrain.trainer import Trainer, _check_data
from dtcp.pretrain.validation_data import describe_validation
from tests.harness.spmd import spmd
from tests.pretrain.test_data import batches, loader

TEXTS = ("--dataloader.dataset", "folder", "--dataloader.dataset-path", "texts")


def validated(*options):
    loader = parse(list(options)).validator.dataloader
    assert loader.part == "validation"
    return loader.dataset, loader.dataset_path, loader.text_key, loader.replace_invalid


def test_a_validation_follows_the_data_that_are_trained_on():
    assert validated() == ("stdlib", None, "text", False)
    switches = ("--dataloader.text_key=t", "--dataloader.replace-invalid")
    assert validated(*TEXTS, *switches) == ("folder", "texts", "t", True)
    other = ("--config", "llama3_8b_128k", "--dataloader.dataset_path", "mine")
    assert validated(*other) == ("folder", "mine", "text", False)


@pytest.mark.parametrize(
    ("options", "data"),
    [
        (["--validator.dataloader.dataset=stdlib"], ("stdlib", None)),
        (["--validator.dataloader.dataset-path=held_out"], ("folder", "held_out")),
    ],
)
def test_what_is_named_of_a_validation_stays(options, data):
    assert validated(*TEXTS, *options)[:2] == data


def test_switches_that_are_named_of_a_validation_stay():
    switches = ("--dataloader.replace-invalid", "--validator.dataloader.no-replace-invalid")
    assert validated(*TEXTS, *switches) == ("folder", "texts", "text", False)


def test_a_config_that_validates_on_other_data_does_so(monkeypatch):
    def mixed():
        config = configs.llama_tiny()
        config.validator.dataloader = PackedDocuments.Config(dataset="c4", part="validation")
        return config

    mixed.__module__ = configs.__name__
    monkeypatch.setattr(configs, "mixed", mixed, raising=False)
    assert validated("--config", "mixed", *TEXTS)[:2] == ("c4", None)


def test_a_run_says_what_it_validates_on_where_it_is_something_else():
    config = parse([*TEXTS, "--validator.dataloader.dataset=stdlib"])
    assert describe_validation(config) == "; validated on stdlib"
    assert describe_validation(parse([*TEXTS])) == ""
    assert describe_validation(parse(["--validator.no-enable"])) == "; not validated (switched off)"


def held_out(text):
    return zlib.crc32(text.encode()) % HELD_OUT == 0


@pytest.fixture
def folder(tmp_path):
    """A folder that holds nothing out, and what adds a file that is held out."""
    texts = [next(t for t in map(str, range(999)) if held_out(t) == out) for out in (False, True)]
    (tmp_path / "0.txt").write_text(texts[0])
    return tmp_path, lambda: (tmp_path / "1.txt").write_text(texts[1])


def test_a_folder_that_holds_nothing_out_is_trained_on_and_not_validated(folder):
    path, hold_out = folder
    options = ["--dataloader.dataset", "folder", "--dataloader.dataset_path", str(path)]
    config = parse(options)
    assert not config.validator.enable
    assert describe_validation(config).startswith(
        "; not validated (none of its documents is held out"
    )
    _check_data(config)
    asked_for = parse([*options, "--validator.freq=7"])
    with pytest.raises(ValueError, match=r"got none for part=validation .*--validator\.no-enable"):
        _check_data(asked_for)
    hold_out()
    assert parse(options).validator.enable


@pytest.mark.parametrize("option", ["--dtcp.verify=3", "--checkpoint.create_seed_checkpoint"])
def test_data_of_a_validation_that_is_not_made_are_not_looked_at(folder, option):
    path = str(folder[0])
    config = parse([option])
    data = PackedDocuments.Config(dataset="folder", dataset_path=path, part="validation")
    config.validator.dataloader = data
    assert config.validator.enable
    _check_data(config)


def test_a_dataset_of_hugging_face_is_validated_on_where_an_option_asks_for_it():
    """By itself it may have no split of that name, which only its first validation would tell."""
    options = ["--dataloader.dataset", "c4"]
    config = parse(options)
    assert not config.validator.enable
    assert "(its splits are not known, name one by" in describe_validation(config)
    for more in ("--validator.dataloader.split=test", "--validator.enable"):
        validator = parse([*options, more]).validator
        assert validator.enable and validator.dataloader.dataset == "c4"


def test_a_validation_that_fills_no_batch_names_its_own_options():
    for part, says in (("validation", "--validator.steps to a"), ("all", "--dataloader.infinite")):
        data = loader(infinite=False, part=part, rows=10_000)
        with pytest.raises(DataError, match=says):
            batches(data, 1)


def test_the_folder_of_torchtitans_tokenizers_is_refused_where_nothing_reads_it():
    assets = ["--hf-assets-path", "x"]
    weights = {
        (): "--checkpoint.initial_load_path with --checkpoint.initial_load_in_hf",
        ("--config=titan_llama3_tiny", "--model.hf=llama"): "--model.hf",
    }
    for model, option in weights.items():
        says = rf"got --hf_assets_path x: set --tokenizer\.folder to it, and {option} for weights"
        with pytest.raises(ValueError, match=says):
            parse([*model, *assets])
    assert parse(["--config", "titan_llama3_tiny", "--hf_assets_path=x"]).hf_assets_path == "x"


@spmd(ranks=2)
def test_ranks_of_which_some_hold_nothing_out_all_refuse_the_run(mesh):
    """Their machines have other files; those that validate would wait for the others."""
    trainer = SimpleNamespace(config=parse([]), device=torch.device("cpu"))
    Trainer._check_validation(trainer)
    trainer.config.validator.enable = mesh.get_local_rank() == 0
    with pytest.raises(ValueError, match=r"some that do not: copy the same files to every machine"):
        Trainer._check_validation(trainer)
