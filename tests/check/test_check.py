"""The parity proof passes what is right, fails what is not, and refuses what cannot be."""

import json

import pytest
import torch
from torch import nn

from dtcp.check import (
    CheckedHuggingFaceModel,
    CheckedMixerModel,
    CheckOptions,
    CheckReport,
    check_model,
    compare,
)
from dtcp.check.__main__ import lines, main
from dtcp.compile import EagerIsland
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface.mixing_probe import find_mixing
from dtcp.huggingface.small_config import small_config
from dtcp.parallelize import Compile, ParallelPlan
from dtcp.sequence.masks import BlockBidirectional, Causal
from dtcp.sequence.prefix_masks import Prefix
from dtcp.softmax import RingAttention
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness.spmd import spmd


class Layer(nn.Module):
    """A mixer between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mixer = SoftmaxAttention(Causal())

    def forward(self, x, attn_metadata):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        return self.out(self.mixer(q, k, v, attn_metadata).flatten(2))


class Small(nn.Module):
    """Positions and a layer: enough to get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(48, 16), nn.Embedding(64, 16)
        self.layer, self.head = Layer(), nn.Linear(16, 48)

    def forward(self, input_ids, position_ids, attn_metadata):
        return self.head(
            self.layer(self.tokens(input_ids) + self.places(position_ids), attn_metadata)
        )


class Answers(Small):
    """With a mask that reads the batch's prefixes and blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer.mixer.mask = Causal() & (Prefix() | BlockBidirectional())


class CountsItsOwnPositions(Small):
    """Right on one device with one document, and nowhere else."""

    def forward(self, input_ids, position_ids, attn_metadata):
        return super().forward(input_ids, torch.arange(position_ids.shape[1])[None], attn_metadata)


class Pools(Small):
    """Tokens meet in a mean, and in no mixer."""

    def forward(self, input_ids, position_ids, attn_metadata):
        out = super().forward(input_ids, position_ids, attn_metadata)
        return out + out.mean(dim=1, keepdim=True)


class Convolves(Small):
    """Tokens meet in a convolution, a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(48, 48, 3, padding=1)

    def forward(self, input_ids, position_ids, attn_metadata):
        out = super().forward(input_ids, position_ids, attn_metadata)
        return self.conv(out.transpose(1, 2)).transpose(1, 2)


def plan(model, mesh, style):
    return ParallelPlan(tp={}, cp={"layer.mixer": style}, blocks=("layer",))


def island_plan(model, mesh, style):
    return plan(model, mesh, RingAttention(boundary=EagerIsland()))


@pytest.mark.parametrize(
    ("degrees", "model"),
    [(Degrees(cp=2), "Small"), (Degrees(dp_shard=2), "Small"), (Degrees(cp=2), "Answers")],
)
@spmd(ranks=2)
def test_right_model_passes(mesh, degrees, model):
    options = CheckOptions(degrees, bound=1e-12)
    checked = CheckedMixerModel(f"tests.check.test_check:{model}")
    result = compare(checked, options, ParallelMesh.from_degrees(degrees, "cpu"), None)
    report = CheckReport(
        checked.mixing(checked.build(), options.style), options.bound, {"e": result}
    )
    assert report.passed and set(report.mixing.claims) == {"layer.mixer"}
    assert result.errors.keys() == {"loss", *dict(Small().named_parameters())}
    for each in ("forward", "backward"):
        assert (result.by_layer[f"layer.mixer, {each}"].received > 0) == (degrees.cp > 1)
    # FSDP's gathers, and the count of tokens.
    assert sum(result.elsewhere.values()) > 2
    assert lines(report, options)[-1] == "PASSED"


@spmd(ranks=2)
def test_model_that_counts_its_own_positions_fails(mesh):
    options = CheckOptions(Degrees(cp=2))
    checked = CheckedMixerModel("tests.check.test_check:CountsItsOwnPositions")
    result = compare(checked, options, ParallelMesh.from_degrees(options.degrees, "cpu"), None)
    report = CheckReport(
        checked.mixing(checked.build(), options.style), options.bound, {"e": result}
    )
    assert not report.passed
    assert "places.weight" in report.failures("e")
    *_, hint, verdict = lines(report, options)
    assert "does the model count positions?" in hint and verdict == "FAILED"


@pytest.mark.parametrize(("plan", "graphs", "breaks"), [("plan", 1, 0), ("island_plan", 2, 1)])
@spmd(ranks=2)
def test_graphs_and_breaks_are_those_of_the_plan(mesh, plan, graphs, breaks):
    options = CheckOptions(Degrees(cp=2))
    checked = CheckedMixerModel("tests.check.test_check:Small", f"tests.check.test_check:{plan}")
    mesh = ParallelMesh.from_degrees(options.degrees, "cpu")
    result = compare(checked, options, mesh, Compile("aot_eager"))
    assert (result.graphs.graphs, result.graphs.breaks) == (graphs, breaks)


@pytest.mark.parametrize(("kind", "where"), [("Pools", "the model"), ("Convolves", "conv")])
def test_mixing_without_a_mixer_is_refused_by_name(kind, where):
    report = check_model(
        CheckedMixerModel(f"tests.check.test_check:{kind}"), CheckOptions(Degrees(cp=2))
    )
    assert not report.passed and not report.runs
    (refused,) = report.mixing.refused
    assert refused.startswith(f"{where} (")


@pytest.mark.parametrize(
    ("module", "mixes"),
    [
        (nn.Linear(8, 8), False),
        (nn.LayerNorm(8), False),
        (nn.LayerNorm([37, 8]), True),
        (nn.MultiheadAttention(8, 2, batch_first=True), True),
        (nn.GRU(8, 8, batch_first=True), True),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU()), False),
    ],
)
def test_mixing_is_found_in_modules_of_torch(module, mixes):
    x = torch.randn(1, 37, 8)
    takes = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
    assert bool(find_mixing(module.eval(), lambda: module(*takes), 37)) == mixes


def test_model_of_transformers_without_the_registry_is_refused(capsys):
    quiet = ["--set", "attention_dropout=0.0", "hidden_dropout=0.0"]
    assert main(["--hf-config", "gpt_neox_japanese", "--cp", "2", *quiet]) == 1
    printed = capsys.readouterr().out
    assert "GPTNeoXJapaneseForCausalLM" in printed and printed.endswith("FAILED\n")


GEMMA = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 1024,
        "torch_dtype": "bfloat16",
    },
}


def test_config_of_a_big_model_is_shrunk_with_a_layer_of_each_kind(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GEMMA))
    small = small_config(str(path), {"rms_norm_eps": 1e-3})
    config = small.config
    text = config.text_config
    assert text.layer_types == ["sliding_attention", "full_attention"]
    assert (text.num_attention_heads, text.num_key_value_heads) == (4, 2)
    assert (text.rms_norm_eps, text.sliding_window, text.hidden_size) == (1e-3, 7, 32)
    assert "shrunk text_config.hidden_size: 2560 -> 32" in small.notes
    assert "shrunk text_config.sliding_window: 1024 -> 7" in small.notes
    path.write_text(json.dumps(config.to_dict()))
    again = small_config(str(path), {})
    assert again.notes == () and again.config.text_config.hidden_size == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--hf-config nowhere.json", "a file that exists, got 'nowhere.json'"),
        ("--hf-config no_such_model", "no_such_model"),
        ("--hf-model tests.check.test_check:nothing", "tests.check.test_check has no nothing"),
        ("--hf-model no.such:module", "there is no module no;"),
        ("--hf-config llama --tp 3", "splits vocab_size into equal parts, got 64 with tp=3"),
        ("--hf-config llama --cp 0", "A degree counts ranks, got cp=0"),
        ("--hf-config llama --set num_hidden_layers=0", "compares layers that mix tokens, got a"),
        (
            "--hf-config llama --set attention_dropout=0.1",
            "set config.attention_dropout = 0.0",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused_in_a_sentence(capsys, arguments, message):
    assert main(arguments.split()) == 1
    printed = capsys.readouterr().out
    assert message in printed and printed.endswith("FAILED\n")


def refusing_plan(model, mesh, style):
    raise ValueError("only ranks know")


def test_what_a_rank_refuses_is_refused_in_a_sentence(capsys):
    command = "--model tests.check.test_check:Small --plan tests.check.test_check:refusing_plan"
    assert main(command.split()) == 1
    assert capsys.readouterr().out.endswith("refused:\n  only ranks know\nFAILED\n")


@spmd(ranks=2)
def test_model_of_transformers_passes(mesh):
    options = CheckOptions(Degrees(cp=2))
    mesh = ParallelMesh.from_degrees(options.degrees, "cpu")
    result = compare(CheckedHuggingFaceModel("gpt_oss"), options, mesh, None)
    assert max(result.errors.values()) < options.bound
