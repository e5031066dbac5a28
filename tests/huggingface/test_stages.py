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
