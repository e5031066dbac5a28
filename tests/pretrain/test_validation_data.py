"""A validation reads what is held out of the data that is trained on, unless others are named."""

import itertools
from types import SimpleNamespace

import pytest

from dtcp.pretrain import configs
from dtcp.pretrain.data import PackedDocuments
from dtcp.pretrain.options import parse
from dtcp.pretrain.progress import _validated_on
from dtcp.pretrain.tokenizer import Tokenizer
from dtcp.pretrain.validation import Validation

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
    assert _validated_on(config) == "; validated on stdlib"
    assert _validated_on(parse([*TEXTS])) == ""
    off = SimpleNamespace(dataloader=config.dataloader, validator=SimpleNamespace(enable=False))
    assert _validated_on(off) == ""


def test_a_validation_of_all_documents_ends(tmp_path):
    """By --validator.steps -1 alone: documents that start over would be read forever."""
    (tmp_path / "x.txt").write_text("a" * 40)
    made = object.__new__(Validation)
    made.config, made.tokenizer = (
        SimpleNamespace(steps=-1),
        Tokenizer.Config().build(tokenizer_path=""),
    )
    data = {"dataset": "folder", "dataset_path": str(tmp_path), "part": "all"}
    made.dl_config, made.dp_world_size, made.dp_rank = PackedDocuments.Config(**data), 1, 0
    made.seq_len, made.local_batch_size = 8, 2
    made.preparation = SimpleNamespace(ahead=lambda batch, labels: {"prepared": batch["input"]})
    made.read_ahead()
    batches = list(itertools.islice(made._opened, 9))
    assert [batch["prepared"].shape for batch, _ in batches] == [(2, 8)] * 2


def test_the_folder_of_torchtitans_tokenizers_is_refused_where_nothing_reads_it():
    with pytest.raises(ValueError, match=r"got --hf_assets_path x: set --tokenizer\.folder"):
        parse(["--hf-assets-path", "x"])
    assert parse(["--config", "titan_llama3_tiny", "--hf_assets_path=x"]).hf_assets_path == "x"
