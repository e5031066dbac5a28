"""Settings that transformers' default configs leave off: what changes masks is read, or refused."""

import pytest
import torch

from dtcp.check.checked_hf import CheckedHuggingFaceModel
from dtcp.check.parity import CheckOptions, compare, seeded
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import causal_lm_loss, survey
from dtcp.huggingface.small_config import small_config
from dtcp.parallelize import parallelize_hf
from dtcp.sequence.masks import Causal, SlidingWindow
from tests.harness.spmd import spmd

LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
SHARED = CheckedHuggingFaceModel("gemma4_text", {**LAYERS, "num_kv_shared_layers": 2})


def test_masks_that_a_model_slices_are_read():
    """Gemma 4 hands layers that share keys a slice of its masks, which is all of them."""
    window = Causal() & SlidingWindow(7)
    surveyed = survey(seeded(SHARED))
    assert surveyed.refused == ()
    assert [each.mask for each in surveyed.attentions] == [window, Causal()] * 2


@pytest.mark.parametrize("number", [3, 6])
def test_kinds_of_layers_that_a_family_names_take_turns(number):
    """However many layers are asked for; it was an error of transformers."""
    for kind, names in (
        ("lfm2", ["conv", "full_attention"]),
        ("minimax_m3_vl_text", ["full_attention", "minimax_m3_sparse"]),
    ):
        config = small_config(kind, {"num_hidden_layers": number}).config
        assert config.layer_types == (names * number)[:number]


@spmd(ranks=2)
def test_layers_that_share_keys_equal_one_device(mesh):
    degrees = Degrees(cp=2)
    result = compare(SHARED, CheckOptions(degrees), ParallelMesh.from_degrees(degrees, "cpu"), None)
    assert max(result.errors.values()) < 1e-5


def test_embeddings_that_go_by_the_masked_tokens_of_a_row_are_refused():
    """As published ESM-2 has them; the default config has not."""
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    change = {**quiet, "token_dropout": True, "mask_token_id": 32}
    (sentence,) = survey(seeded(CheckedHuggingFaceModel("esm", change))).refused
    assert "embeddings (EsmEmbeddings): scales" in sentence
    assert sentence.endswith("set config.token_dropout = False.")


@spmd(ranks=1)
def test_types_of_tokens_are_refused_where_masks_go_by_them(mesh):
    """HRM's prefixes see both sides; with types that are all alike there are none."""
    model = seeded(CheckedHuggingFaceModel("hrm_text"))
    mesh = ParallelMesh.from_degrees(Degrees(), "cpu")
    parallelize_hf(model, mesh)
    ids = torch.arange(3, 27)[None]
    batch = {"input_ids": ids, "labels": ids}
    types = torch.zeros_like(ids)
    assert causal_lm_loss(model, {**batch, "token_type_ids": types}, mesh).isfinite()
    types[:, :5] = 1
    with pytest.raises(ValueError, match="by documents and not by types of tokens, got token_type"):
        causal_lm_loss(model, {**batch, "token_type_ids": types}, mesh)
    inner = {"input_ids": ids, "position_ids": ids, "token_type_ids": types}
    with pytest.raises(ValueError, match="for a HrmTextForCausalLM, whose masks do"):
        model(**inner, attn_metadata=object())
