"""Models of transformers that are cut into pipeline stages, and those that are not."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from dtcp.huggingface import install_mixers, stage_cut
from dtcp.huggingface.small_config import small_config
from dtcp.huggingface.stages import find_cut, keep_stage
from dtcp.parallelize import load_hf

CUT = {
    "llama": ("model.layers", ("model.embed_tokens",), ("model.norm", "lm_head")),
    "gpt2": (
        "transformer.h",
        ("transformer.wte", "transformer.wpe"),
        ("transformer.ln_f", "lm_head"),
    ),
    "mamba2": ("backbone.layers", ("backbone.embeddings",), ("backbone.norm_f", "lm_head")),
}
REFUSED = {
    "gemma4_text": "its stages do not run by themselves",
    "zaya": "its model has weights around model.layers",
    "zamba": "shared_transf.* are one weight",
    "hrm_text": "its layers are not in one list of 2",
    "qwen4_exp_text": r"its layers hand on \[1, 24, 64\] for \[1, 24\] tokens",
    "ctrl": "stages of it give other logits than the whole model",
}

EMBEDDED = {
    ("opt", "word_embed_proj_dim"): {"dropout": 0.0},
    ("electra", "embedding_size"): {
        "is_decoder": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}


def model_of(kind: str):
    config = small_config(kind, {"attn_pdrop": 0.0} if kind == "gpt2" else {}).config
    if kind == "ctrl":
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", CUT)
def test_a_trial_finds_where_a_model_is_cut(kind):
    cut = stage_cut(model_of(kind))
    assert (cut.layers, cut.first, cut.last) == CUT[kind]
    assert cut.stage(range(cut.count)).is_first and cut.stage(range(cut.count)).is_last
    for numbers in (range(0), range(1, cut.count + 1), range(-1, 1), range(0, cut.count, 2)):
        with pytest.raises(ValueError, match=re.escape(f"got numbers={numbers}")):
            cut.stage(numbers)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_whose_stages_would_compute_something_else_is_refused(kind):
    with pytest.raises(ValueError, match=rf"hidden states alone, got a \w+, but .*{REFUSED[kind]}"):
        stage_cut(model_of(kind))


@pytest.mark.parametrize("width", [64, 32, 16])
@pytest.mark.parametrize(("kind", "field"), EMBEDDED)
def test_embeddings_are_projected_by_stages_where_they_are_by_the_model(kind, field, width):
    """In a narrow copy of the config, too; 32 is how wide that is."""
    fields = {"hidden_size": 64, "num_attention_heads": 4, field: width}
    config = small_config(kind, {**EMBEDDED[kind, field], **fields}).config
    model = AutoModelForCausalLM.from_config(config)
    cut = stage_cut(model)
    projects = [name for name in (*cut.first, *cut.last) if "project" in name]
    assert bool(projects) == (width != 64)
    ends = [model.get_submodule(name) for name in (*cut.first, cut.layers, *cut.last)]
    assert {x for end in ends for x in end.parameters()} == set(model.parameters())


def _with_a_weight_more(model):
    model.model.register_module("after", torch.nn.Linear(2, 2))


def _with_a_layer_less(model):
    del model.model.layers[1]


def _with_layers_that_share(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def _without_an_end(model):
    del model.model.norm


CHANGED = {
    "has no model.after.weight, which would be in no stage": _with_a_weight_more,
    "has 2 model.layers, and it 1": _with_a_layer_less,
    "model.layers.0.mlp.up_proj.weight and .*1.mlp.up_proj.weight are one": _with_layers_that_share,
    "has a model.norm, which it has not": _without_an_end,
}


@pytest.mark.parametrize("refusal", CHANGED)
def test_a_model_that_is_not_built_as_its_config_says_is_refused(refusal):
    """Its copy, which is tried, would be."""
    model = AutoModelForCausalLM.from_config(small_config("llama", {}).config)
    CHANGED[refusal](model)
    with pytest.raises(ValueError, match=refusal):
        stage_cut(model)


def test_a_weight_that_runs_between_layers_is_refused():
    model = AutoModelForCausalLM.from_config(small_config("llama", {}).config)
    norm = model.model.norm
    model.model.layers[0].register_forward_hook(lambda *args: norm(args[-1]))
    with pytest.raises(ValueError, match=r"its model.norm has weights that run neither before"):
        find_cut(model, lambda: model(input_ids=torch.zeros(1, 4, dtype=torch.int64)))


def test_a_tied_head_that_files_hold_as_another_is_refused_in_every_stage():
    """As in the whole model: each stage holds one of the two."""
    config = small_config("qwen3", {"tie_word_embeddings": True}).config
    weights = AutoModelForCausalLM.from_config(config).state_dict()
    for number in range(2):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        cut = stage_cut(model)
        install_mixers(model)
        keep_stage(model, cut.stage(range(number, number + 1)))
        load_hf(model, weights, device="cpu")
        other = weights | {"lm_head.weight": weights["lm_head.weight"] + 1}
        with pytest.raises(ValueError, match=r"have one, got lm_head.weight and .*embed_tokens"):
            load_hf(model, other, device="cpu")
