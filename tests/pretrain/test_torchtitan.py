"""The adapter's parts, in this process and without ranks. Runs as a whole: test_train.py."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from dtcp.torchtitan import compat
from dtcp.torchtitan.model_spec import llama
from dtcp.torchtitan.overrides import MixerAttention
from dtcp.torchtitan.section import LAYOUT_CLASSES, Section

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from dtcp.models.llama import PRESETS, config_from_hf
from dtcp.pretrain import configs as config_registry
from dtcp.pretrain.adopt import adopt, adopt_model
from dtcp.pretrain.data import PackedDocuments
from dtcp.pretrain.launch import check_world, ranks_for
from dtcp.pretrain.options import config_names, parse
from dtcp.pretrain.plot import TRAINING, plot_losses, read_losses
from dtcp.pretrain.report import say_failure
from dtcp.pretrain.sources import TextFiles, folder, standard_library
from dtcp.pretrain.tokenizer import Tokenizer
from dtcp.pretrain.trainer import Trainer
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.style import AttentionStyle

CONFIGS = config_names(config_registry)
TOKENIZER = Tokenizer.Config().build(tokenizer_path="")


@dataclass(frozen=True)
class Texts:
    """A source of made-up documents, in another order each epoch."""

    texts: tuple[str, ...]

    def documents(self, epoch: int) -> Iterator[str]:
        return iter(self.texts if epoch % 2 == 0 else self.texts[::-1])


TEXTS = Texts(("a", "bcdefghijklmnopqrstuvwxyz" * 3, "0123456789", "xy", "end"))


def loader(*, ranks: int = 1, rank: int = 0, rows: int = 1, **options: Any) -> PackedDocuments:
    built = PackedDocuments.Config(**options).build(
        dp_world_size=ranks, dp_rank=rank, tokenizer=TOKENIZER, seq_len=16, local_batch_size=rows
    )
    built.source = TEXTS
    return built


def batches(data: PackedDocuments, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(batch["input"], labels) for batch, labels in islice(data, count)]


def test_the_cpu_device_answers_all_that_torchtitan_asks():
    device = compat.CpuDevice()
    assert device.current_device() == 0
    assert (
        device.get_device_properties().total_memory
        > device.memory_stats()["reserved_bytes.all.peak"]
    )
    device.synchronize()


def test_a_byte_is_a_token():
    text = "def f(x): return '\u00e9' # \N{SNOWMAN}"
    ids = TOKENIZER.encode(text, add_bos=True, add_eos=True)
    assert len(ids) == len(text.encode()) + 2
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize(("ranks", "rows"), [(1, 4), (2, 2), (4, 1)])
def test_every_mesh_reads_the_same_rows(ranks, rows):
    expected = batches(loader(rows=4), 5)
    parts = [batches(loader(ranks=ranks, rank=r, rows=rows), 5) for r in range(ranks)]
    for step, (tokens, labels) in enumerate(expected):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), tokens)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), labels)


def test_a_label_is_the_next_token_of_its_document():
    for batch, labels in islice(loader(rows=2), 10):
        for row, lengths in enumerate(batch["documents"].lengths):
            ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
            for start, end in pairwise([0, *ends]):
                inside = labels[row, start : end - 1]
                assert torch.equal(inside, batch["input"][row, start + 1 : end])
        assert (labels != TOKENIZER.bos_id).all()


def test_rows_hold_every_token_of_an_epoch_once():
    rows = batches(loader(infinite=False), 100)
    tokens = torch.cat([tokens.flatten() for tokens, _ in rows]).tolist()
    whole = [t for text in TEXTS.texts for t in TOKENIZER.encode(text, add_bos=True)]
    assert tokens == whole[: len(tokens)] and len(whole) - len(tokens) < 16


@pytest.mark.parametrize("stop", range(1, 9))
def test_data_goes_on_where_it_stopped_on_another_mesh(stop):
    """Through the end of an epoch, too."""
    expected = batches(loader(rows=2), stop + 3)[stop:]
    data = loader(rows=2)
    batches(data, stop)
    state = json.loads(json.dumps(data.state_dict()))
    resumed = [loader(ranks=2, rank=rank) for rank in range(2)]
    parts = []
    for each in resumed:
        each.load_state_dict(state)
        parts.append(batches(each, 3))
    for step, (tokens, _) in enumerate(expected):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), tokens)


def test_positions_restart_with_each_document():
    batch, _ = next(iter(loader()))
    assert batch["positions"][0].tolist()[:5] == [0, 1, 0, 1, 2]
    assert batch["documents"].to("meta") is batch["documents"]


def test_training_and_validation_share_no_document():
    parts = [set(standard_library(part).documents(0)) for part in ("train", "validation")]
    assert parts[0] and parts[1] and not parts[0] & parts[1]


def test_an_epoch_is_an_order_of_the_same_documents():
    source = standard_library("validation")
    first, again, second = (list(source.documents(epoch)) for epoch in (0, 0, 1))
    assert first == again != second and sorted(first) == sorted(second)


def test_documents_beyond_the_longest_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("short\n\n" + "long " * 20)
    source = TextFiles((tmp_path / "a.txt",), separator="\n\n", longest=50)
    assert list(source.documents(0)) == ["short"]


def test_a_folder_gives_texts_and_the_lines_of_a_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"body": "two"}\n{"body": "three"}\n')
    source = folder(str(tmp_path), "all", text_key="body")
    assert sorted(source.documents(0)) == ["one", "three", "two"]


def test_data_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset_path=/nowhere: no such folder"):
        folder("/nowhere", "all", text_key="text")
    with pytest.raises(ValueError, match="got none in"):
        folder(str(tmp_path), "all", text_key="text")
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\nbroken\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2='broken"):
        list(folder(str(tmp_path), "all", text_key="text").documents(0))


def test_a_source_without_documents_is_refused():
    data = loader()
    data.source = Texts(())
    with pytest.raises(ValueError, match="got none from dataset=stdlib"):
        next(iter(data))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_one_that_can_start(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for needed in ("texts/a.txt", "Llama-3.1-8B/tokenizer.json"):
        Path(needed).parent.mkdir()
        Path(needed).touch()
    config = getattr(config_registry, name)()
    assert isinstance(config, Trainer.Config) and getattr(config_registry, name).__doc__
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
        (["--parallelism.spmd_backend", "spmd_types"], "set it to partial_dtensor"),
        (["--parallelism.pipeline_parallel_degree", "2"], "pipeline_parallel_degree=2"),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_ranks_start(option, says):
    with pytest.raises((ValueError, NotImplementedError), match=says):
        parse(option).check()


def test_a_world_that_the_mesh_does_not_fill_is_refused():
    mesh = config_registry.llama_tiny().parallelism
    check_world(mesh, 8)
    with pytest.raises(ValueError, match=r"cp 2 x tp 2 .* world_size=6: start a multiple of 4"):
        check_world(mesh, 6)
    with pytest.raises(ValueError, match="world_size=8: start 4 ranks"):
        check_world(replace(mesh, data_parallel_shard_degree=1), 8)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses", "hybrid"])
@pytest.mark.parametrize("boundary", ["in_graph", "eager_island"])
def test_a_section_names_classes(strategy, boundary):
    section = Section(strategy=strategy, boundary=boundary)
    assert isinstance(section.attention_style(), AttentionStyle)
    assert all(issubclass(layout, SequenceLayout) for layout in LAYOUT_CLASSES.values())


def test_a_config_of_torchtitan_is_adopted_with_our_attention():
    # Not at the top, where they would come before dtcp.torchtitan.
    from torchtitan.config.override import apply_overrides
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    config = adopt(llama3_debugmodel())
    assert isinstance(config, Trainer.Config) and adopt(config) is config
    assert config.parallelism.spmd_backend == "partial_dtensor"
    apply_overrides(config.override, config)
    assert all(
        isinstance(layer.attention.inner_attention, MixerAttention.Config)
        for layer in config.model_spec.model.layers
    )


def test_a_model_that_is_no_decoder_is_not_adopted():
    with pytest.raises(ValueError, match="got the model none"):
        adopt_model(None)


def test_weights_go_to_hugging_face_names_and_back():
    spec = config_registry.qwen3_tiny().model_spec
    adapter = spec.state_dict_adapter(spec.model, None)
    weights = spec.model.build().state_dict()
    theirs = adapter.to_hf(weights)
    assert "model.layers.0.self_attn.q_norm.weight" in theirs and "lm_head.weight" not in theirs
    ours = adapter.from_hf(theirs)
    assert ours.keys() == weights.keys()
    assert all(torch.equal(ours[name], weights[name]) for name in weights)


@pytest.mark.parametrize("name", [*PRESETS])
def test_an_exported_config_is_read_back(name):
    spec = llama(name, PRESETS[name])
    theirs = spec.state_dict_adapter(spec.model, None).hf_config()
    assert config_from_hf(json.loads(json.dumps(theirs))) == PRESETS[name]


def test_a_plot_shows_a_step_as_it_was_last(tmp_path):
    for start, values in enumerate(([3.0, 2.0, 9.0], [1.5, 1.0])):
        with SummaryWriter(str(tmp_path / f"tb/{start}")) as log:
            for step, value in enumerate(values, start=1 if start == 0 else 3):
                log.add_scalar(TRAINING, value, step)
    assert read_losses(tmp_path, TRAINING) == {1: 3.0, 2: 2.0, 3: 1.5, 4: 1.0}
    assert plot_losses(tmp_path).stat().st_size > 1000


def test_a_plot_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got none in folder"):
        plot_losses(tmp_path)


def test_a_failure_is_one_line_and_a_file(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    say_failure(ValueError("x is y, got x=1: set it to 2."), tmp_path)
    assert capsys.readouterr().err.startswith("error: x is y, got x=1: set it to 2.\n(traceback")
    assert "ValueError" in (tmp_path / "errors/rank_0.txt").read_text()
    monkeypatch.setenv("RANK", "1")
    say_failure(ValueError("x is y, got x=1: set it to 2."), tmp_path)
    assert not capsys.readouterr().err
