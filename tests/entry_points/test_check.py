"""The check tells the truth: nothing right fails it, nothing wrong passes, and no traceback."""

import json

import pytest
import torch
from torch import nn

from dtcp.check import CheckedHuggingFaceModel, CheckedMixerModel, CheckOptions, compare
from dtcp.check.__main__ import main
from dtcp.check.checked_model import vocabulary
from dtcp.check.memory import MemoryEstimate
from dtcp.check.parity import FLOOR
from dtcp.check.ranks import CheckReport
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface.language_model import model_of, parameter_count
from dtcp.huggingface.mixing_probe import find_mixing
from dtcp.huggingface.small_config import MOST_PARAMETERS, small_config
from dtcp.parallelize import ParallelPlan
from dtcp.sequence.masks import Bidirectional
from dtcp.softmax import RingAttention, UlyssesAttention
from dtcp.softmax.mixer import CrossAttention, SoftmaxAttention
from tests.check.test_check import CountsItsOwnPositions, Layer, Small
from tests.harness.spmd import spmd

HERE = "tests.entry_points.test_check"
QUIET = {"dropout": 0.0, "attention_dropout": 0.0}


def compared(mesh, kind, plan="", **change):
    """A model of this file on a mesh of cp alone, eager."""
    options = CheckOptions(Degrees(cp=mesh.size()))
    checked = CheckedMixerModel(f"{HERE}:{kind}", plan and f"{HERE}:{plan}", change)
    result = compare(checked, options, ParallelMesh.from_degrees(options.degrees, "cpu"), None)
    return result, CheckReport(checked.mixing(checked.build(), options.style), 1e-5, {"e": result})


class Head(Small):
    """A head of any number of classes, and of one."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(16, classes)


class WrongHead(CountsItsOwnPositions):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(16, classes)


class Faint(CountsItsOwnPositions):
    """Wrong in a part whose gradients are small: of a thousandth of the others' size."""

    def forward(self, input_ids, position_ids, attn_metadata):
        counted = torch.arange(position_ids.shape[1])[None]
        x = self.tokens(input_ids) + 1e-3 * self.places(counted)
        return self.head(self.layer(x, attn_metadata))


class KeepsLoss(Small):
    """A loss of all tokens in an attribute: a sum, of which ranks have parts, or a mean.

    In a dict, in a list that grows, or added to the losses before.
    """

    def __init__(self, mean: bool, kept: str) -> None:
        super().__init__()
        self.mean, self.kept = mean, kept
        self.losses, self.total = {"balance": []}, 0.0

    def forward(self, input_ids, position_ids, attn_metadata):
        square = self.tokens(input_ids).square()
        loss = square.mean() if self.mean else square.sum()
        if self.kept == "dict":
            self.losses["balance"] = loss
        elif self.kept == "list":
            self.losses["balance"].append(loss)
        else:
            self.total = self.total + loss
        return super().forward(input_ids, position_ids, attn_metadata)


class Crosses(Small):
    """Attends to another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = SoftmaxAttention(Bidirectional())

    def forward(self, input_ids, position_ids, attn_metadata):
        x = super().forward(input_ids, position_ids, attn_metadata).unflatten(-1, (3, 16))
        return self.cross(x, *(torch.cat([x, x[:, :5]], 1),) * 2, attn_metadata).flatten(2)


class Translates(Small):
    def __init__(self) -> None:
        super().__init__()
        self.cross = CrossAttention()


class SmoothsKeys(Small):
    """Tokens meet on the way to the keys alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer.forward = self._layer

    def _layer(self, x, attn_metadata):
        q, k, v = self.layer.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        return self.layer.out(self.layer.mixer(q, k.cumsum(1), v, attn_metadata).flatten(2))


class Means(Small):
    """One vector for a row."""

    def forward(self, input_ids, position_ids, attn_metadata):
        return super().forward(input_ids, position_ids, attn_metadata).mean(1)


class Returns(Small):
    def forward(self, input_ids, position_ids, attn_metadata):
        return super().forward(input_ids, position_ids, attn_metadata), None


class Blind(Small):
    """No gradient anywhere."""

    def forward(self, input_ids, position_ids, attn_metadata):
        return super().forward(input_ids, position_ids, attn_metadata) * 0.0


class Infinite(Small):
    def forward(self, input_ids, position_ids, attn_metadata):
        return super().forward(input_ids, position_ids, attn_metadata) * torch.inf


class Breaks(Small):
    def forward(self, input_ids, position_ids, attn_metadata):
        raise KeyError("layers")


class WantsWholeRows(Small):
    def forward(self, input_ids, position_ids, attn_metadata):
        if input_ids.shape[1] == 24:
            raise RuntimeError("whole rows")
        return super().forward(input_ids, position_ids, attn_metadata)


class Branches(Layer):
    """Of a layer that no graph holds: a branch on what it computed."""

    def forward(self, x, attn_metadata):
        out = super().forward(x, attn_metadata)
        return out if out.sum().item() > 0 else out.clone()


class HasNoGraph(Small):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Branches()


def blocks_plan(model, mesh, style):
    return ParallelPlan(tp={}, cp={"layer.mixer": style}, blocks=("layer",))


def ulysses_plan(model, mesh, style):
    return ParallelPlan(tp={}, cp={"layer.mixer": UlyssesAttention()}, blocks=())


def a_llama(num_hidden_layers):
    return model_of(small_config("llama", {"num_hidden_layers": num_hidden_layers}).config)


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
@spmd(ranks=2)
def test_B6_a_gradient_of_zero_is_not_divided_by_itself(mesh, kind):
    options = CheckOptions(Degrees(cp=2))
    names = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "opt": tuple(QUIET)}[kind]
    checked = CheckedHuggingFaceModel(kind, dict.fromkeys(names, 0.0))
    result = compare(checked, options, ParallelMesh.from_degrees(options.degrees, "cpu"), None)
    assert max(result.errors.values()) < 1e-12
    keys = [name for name in result.errors if "k_proj.bias" in name or "c_attn.bias" in name]
    assert keys


@spmd(ranks=2)
def test_B6_a_wrong_gradient_below_the_others_is_found(mesh):
    assert FLOOR > 1e-3  # else its gradient would be what is divided by
    _, report = compared(mesh, "Faint")
    assert report.failures("e")["places.weight"] > 1e-3


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 64])
@spmd(ranks=2)
def test_B7_heads_of_any_width_are_compared(mesh, classes):
    result, report = compared(mesh, "Head", classes=classes)
    assert report.passed and max(result.errors.values()) < 1e-12
    _, wrong = compared(mesh, "WrongHead", classes=classes)
    assert "places.weight" in wrong.failures("e")


@pytest.mark.parametrize(
    ("kept", "name"),
    [("dict", "losses['balance']"), ("list", "losses['balance'][0]"), ("", "total")],
)
@spmd(ranks=2)
def test_B7_losses_that_modules_keep_are_compared(mesh, kept, name):
    _, mean = compared(mesh, "KeepsLoss", mean=True, kept=kept)
    failures = mean.failures("e")
    assert failures[f"auxiliary loss {name}"] > 0.5 and "tokens.weight" in failures
    _, parts = compared(mesh, "KeepsLoss", mean=False, kept=kept)
    assert parts.passed and parts.runs["e"].errors[f"auxiliary loss {name}"] < 1e-12


@spmd(ranks=2)
def test_B7_claims_are_those_of_the_plan(mesh):
    result, report = compared(mesh, "Small", plan="ulysses_plan")
    assert list(result.claims) == list(report.claims) == ["layer.mixer"]
    assert report.claims["layer.mixer"].startswith("UlyssesAttention(")
    assert "SoftmaxAttention(mask=Causal()" in report.claims["layer.mixer"]


def test_B7_claims_of_a_plan_that_no_rank_has_applied_name_the_plan():
    checked = CheckedMixerModel(f"{HERE}:Small", f"{HERE}:ulysses_plan")
    mixing = checked.mixing(checked.build(), RingAttention())
    assert mixing.claims["layer.mixer"].startswith(f"claimed by {HERE}:ulysses_plan, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (f"--model {HERE}:Crosses", "cross (SoftmaxAttention): Attention reads the keys of its"),
        (f"--model {HERE}:SmoothsKeys", "layer (Layer): tokens meet in it, and in no mixer"),
        (f"--model {HERE}:Means", "one vector for each token, got a tensor of shape [1, 48]"),
        (f"--model {HERE}:Returns", "got a tuple from Returns for [1,"),
        (f"--model {HERE}:Translates", "got cross (CrossAttention), which attends to another"),
        (f"--model {HERE}:Breaks", "Breaks runs on one device, got KeyError at test_check.py:"),
        (f"--model {HERE}:Blind --compile=", "has gradients on one device, got none in Blind"),
        (f"--model {HERE}:Infinite --compile=", "has a finite loss on one device, got"),
        (f"--model {HERE}:WantsWholeRows --compile=", "did not (RuntimeError: whole rows)"),
        (
            f"--model {HERE}:HasNoGraph --plan {HERE}:blocks_plan",
            "leave compile out, here by --compile ''; eager the model is right",
        ),
        (
            "--model tests.entry_points.no_python:Model",
            "there is no module tests.entry_points.no_python;",
        ),
        ("--hf-config llama --seq-len 8", "into each row, got seq_len=8: give at least 14"),
        (f"--model {HERE}:Head", "Head.__init__() missing 1 required"),
        (f"--model {HERE}:Head --set classes=3 width=2", "unexpected keyword argument 'width'"),
        (f"--model {HERE}:Head --set classes", "--set takes key=json, got 'classes'"),
        (f"--model {HERE}:Head --set classes=three", "--set takes key=json, got 'classes=three'"),
        (f"--model {HERE}:QUIET", "has a dict QUIET"),
        (f"--hf-model {HERE}:Small", "returns a model of transformers, got Small"),
        (f"--hf-model {HERE}:a_llama --set num_hidden_layers=0.5", "(num_hidden_layers=0.5), got"),
        ("--hf-config llama --set dropuot=0", "got 'dropuot', which that of 'llama' has not"),
        ("--hf-config llama --plan a:b", "--plan says how a model with mixers is sharded"),
        ("--hf-config rwkv", "attention from the attention registry, got RwkvForCausalLM"),
        ("--hf-config vit", "or one that reads images, got 'vit'"),
        (
            "--hf-config llama --tp 2 "
            "--set num_attention_heads=3 num_key_value_heads=3 hidden_size=48",
            "Tensor parallelism splits num_attention_heads into equal parts, got 3 with tp=2",
        ),
        ("--hf-config musicgen", "transformers builds a model of 'musicgen', got AttributeError"),
    ],
)
def test_B7_what_cannot_be_checked_is_a_sentence_and_an_exit_code(capsys, arguments, message):
    assert main(arguments.split()) == 1
    printed = capsys.readouterr().out
    assert message in printed and printed.endswith("FAILED\n") and "Traceback" not in printed


@pytest.mark.parametrize(
    ("kind", "inner"),
    [("gemma3", "text_config"), ("llama4", "text_config"), ("gemma3", "vision_config")],
)
def test_B7_configs_inside_of_configs_are_shrunk(kind, inner, tmp_path):
    config = small_config(kind, {}).config
    assert getattr(config, inner).hidden_size == 32
    count = parameter_count(config)
    assert count < 2**18 < MOST_PARAMETERS
    assert MemoryEstimate.of(count, 2, compiles=True).needed < 2 * 10**9
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": kind, inner: {"hidden_size": 768}}))
    small = small_config(str(path), {f"{inner}.attention_dropout": 0})
    assert getattr(small.config, inner).attention_dropout == 0.0
    assert f"shrunk {inner}.hidden_size: 768 -> 32" in small.notes


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_B7_rotary_frequencies_of_long_rows_are_those_of_tiny_heads(kind, tmp_path):
    """Past a limit that a check's rows go past; and others are set by the name of today."""
    factors = {"short_factor": [1.0] * 48, "long_factor": [float(i) for i in range(1, 49)]}
    rope = {"type": kind, **(factors if kind == "longrope" else {"factor": 4.0})}
    sizes = {"hidden_size": 3072, "num_attention_heads": 32, "max_position_embeddings": 131072}
    limit = {"original_max_position_embeddings": 4096} if kind == "longrope" else {}
    model = {"model_type": "phi3" if limit else "mistral"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**model, **sizes, **limit, "rope_scaling": rope}))
    config = small_config(str(path), {}).config
    assert config.rope_parameters["rope_type"] == kind
    if limit:
        assert config.rope_parameters["long_factor"] == [1.0, 13.0, 25.0, 37.0]
        assert config.original_max_position_embeddings == 16
    else:
        assert config.max_position_embeddings == 16
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert small_config(str(path), plain).config.rope_parameters["rope_type"] == "default"


def test_B7_a_field_of_the_text_model_is_set_by_its_name_alone():
    config = small_config("gemma3", {"rms_norm_eps": 1e-3, "vision_config.patch_size": 7}).config
    assert (config.text_config.rms_norm_eps, config.vision_config.patch_size) == (1e-3, 7)


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_B7_the_number_of_layers_is_set_and_their_kinds_take_turns(layers):
    kinds = ["sliding_attention", "full_attention"] * 3
    config = small_config("gemma3", {"num_hidden_layers": layers}).config.text_config
    assert (config.num_hidden_layers, config.layer_types) == (layers, kinds[:layers])


def test_B7_memory_is_said_before_it_is_taken_and_refused_beyond_what_is_free(capsys):
    assert main(["--model", f"{HERE}:Means"]) == 1
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("memory: about ") and "2 ranks" in first
    estimate = MemoryEstimate.of(10**9, 4, compiles=False)
    assert estimate.needed > 8 * 10**9 * 16
    with pytest.raises(ValueError, match=r"136\.9 GiB.* where 8\.0 GiB are free: check a smaller"):
        MemoryEstimate(10**9, 4, 147 * 10**9, 2**33).check()


LIKE_OTHERS = ("bamba", "granitemoehybrid", "deepseek_v3", "glm_moe_dsa", "hrm_text", "dots1")


@pytest.mark.slow_where(lambda kind: kind in LIKE_OTHERS)
@pytest.mark.parametrize(
    "kind",
    [
        *("falcon", "mamba2", "bamba", "granitemoehybrid", "dots1", "lfm2_moe", "kimi_linear"),
        *("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "gemma3", "llama4"),
        *("gpt_neox", "hrm_text"),
    ],
)
def test_B8_a_family_passes_the_survey_or_is_refused_in_sentences(kind):
    checked = CheckedHuggingFaceModel(kind)
    model = checked.build()
    mixing = checked.mixing(model, RingAttention(), tp=2)
    assert mixing.refused or mixing.claims
    assert vocabulary(model) == model.get_input_embeddings().num_embeddings == 64
    assert all(": " in sentence and sentence.endswith(".") for sentence in mixing.refused)


def test_B8_a_changed_id_is_one_of_those_there_are():
    types = nn.Embedding(1, 8)
    assert find_mixing(types, lambda: types(torch.zeros(1, 37, dtype=torch.int64)), 37) == []


def test_B8_a_remedy_that_sets_zero_works_where_a_config_wants_a_float():
    config = small_config("phimoe", {"router_jitter_noise": 0, "attention_dropout": 0}).config
    assert type(config.router_jitter_noise) is float and config.router_jitter_noise == 0.0


@pytest.mark.parametrize("option", ["--hf-config", "--hf-model", "--model"])
def test_a_model_without_a_name_is_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([option, ""])
    assert "a model has a name, got none" in capsys.readouterr().err
