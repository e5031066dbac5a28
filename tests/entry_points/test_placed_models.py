"""A batch meets the model it is cut for: one with mixers, with embeddings for its tokens."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dtcp import Degrees, ParallelMesh, causal_lm_loss
from dtcp.huggingface import WholeRows, shard_hf_batch
from dtcp.huggingface.meta_device import survey_on_meta
from dtcp.huggingface.survey import survey
from dtcp.parallelize import Compile, parallelize_hf
from dtcp.parallelize.tensor_parallel import ScaledVocabParallelEmbedding, VocabParallelEmbedding
from tests.harness.spmd import spmd

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
GPT2 = {
    "vocab_size": 48,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 40,
    **dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0),
}


def build(kind="llama", **shape):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(shape or SHAPE)))


def a_batch():
    ids = torch.arange(1, 33)[None]
    return {"input_ids": ids, "labels": ids.clone()}


@spmd(ranks=2)
def test_never_silent_a_model_without_mixers_is_refused(mesh):
    """It would take the metadata for one more keyword, and attend inside of each shard."""
    mesh, model = ParallelMesh.from_degrees(Degrees(cp=2), "cpu"), build()
    calls = [
        lambda: causal_lm_loss(model, a_batch(), mesh),
        lambda: shard_hf_batch(a_batch(), mesh, model=model),
        lambda: WholeRows(model, mesh)(**a_batch()),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"LlamaForCausalLM as transformers builds it: call"):
            call()
    parallelize_hf(model, mesh)
    for call in calls:
        call()
    with pytest.raises(ValueError, match=r"once, got a FSDPLlamaForCausalLM that has them"):
        parallelize_hf(model, mesh)


@spmd(ranks=1)
def test_never_silent_weights_of_two_kinds_are_refused(mesh):
    mesh, model = ParallelMesh.from_degrees(Degrees(), "cpu"), build()
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"with lm_head.weight on the meta device and others not"):
        parallelize_hf(model, mesh)


@spmd(ranks=2)
def test_never_silent_another_implementation_after_mixers_is_refused(mesh):
    mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    model = parallelize_hf(build(), mesh)
    model.set_attn_implementation("sdpa")
    local, sharded = shard_hf_batch(a_batch(), mesh, model=model)
    inputs = {"input_ids": local["input_ids"], "position_ids": local["position_ids"]}
    for called in (model, model.model):
        with pytest.raises(ValueError, match="attention was set to 'sdpa' after them"):
            called(**inputs, attn_metadata=sharded.attn_metadata)


@pytest.mark.parametrize(
    ("at", "ids", "says"),
    [
        (0, 48, r"from 0 to 47, got input_ids\[0, 5\]=48"),
        (1, -1, r"from 0 to 47, got input_ids\[0, 5\]=-1"),
        (1, 0.5, r"input_ids.dtype=torch.float32"),
    ],
)
@spmd(ranks=2)
def test_never_silent_ids_without_an_embedding_are_refused_on_all_ranks(mesh, at, ids, says):
    """Though one rank alone has them, and would raise by itself while the other waits."""
    mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    model, batch = parallelize_hf(build(), mesh), a_batch()
    if mesh.rank("cp") == at:
        batch["input_ids"] = batch["input_ids"].to(torch.tensor(ids).dtype)
        batch["input_ids"][0, 5] = ids
        expected = says
    else:
        expected = "cp rank . refused its batch"
    with pytest.raises((ValueError, TypeError), match=expected):
        causal_lm_loss(model, batch, mesh)


@spmd(ranks=2)
def test_never_silent_ids_outside_of_a_split_vocabulary_give_nan(mesh):
    embedding = nn.Embedding(4, 3)
    VocabParallelEmbedding()._apply(embedding, mesh)
    out = embedding(torch.tensor([0, 3, 4, -1]))
    assert out.isnan().any(1).tolist() == [False, False, True, True]


class Shifted(nn.Embedding):
    """Adds a number, or a tensor of one number, to what it looks up."""

    def __init__(self, by):
        super().__init__(4, 3, dtype=torch.float64)
        self.by = nn.Buffer(torch.tensor(by, dtype=torch.float64)) if by == 2.0 else by

    def forward(self, input_ids):
        return super().forward(input_ids) + self.by


class Unread(nn.Embedding):
    def forward(self, input_ids):
        return nn.functional.embedding(input_ids, self.weight)


@pytest.mark.parametrize("order", [(2.0, 3.0, 2.0), (3.0, 2.0, 3.0)])
@spmd(ranks=2)
def test_never_silent_split_embeddings_take_numbers_for_numbers_and_tensors_for_tensors(
    mesh, order
):
    """DTensor takes the second one of a process for the first, in fp64: wrong by the number."""
    ids = torch.tensor([0, 3, 1])
    for by in order:
        torch.manual_seed(0)
        embedding, split = Shifted(by), Shifted(by)
        split.load_state_dict(embedding.state_dict())
        split = ScaledVocabParallelEmbedding()._apply(split, mesh)
        expected, out = embedding(ids), split(ids)
        torch.testing.assert_close(out, expected)
        expected.sin().sum().backward()
        out.sin().sum().backward()
        grad = split.weight.grad.full_tensor()
        torch.testing.assert_close(grad, embedding.weight.grad)
        torch.testing.assert_close(copy.deepcopy(split)(ids), embedding(ids))
        with pytest.raises(TypeError, match="is not pickled"):
            pickle.dumps(split)
    with pytest.raises(TypeError, match=r"by super\(\), got Unread: set tp=1"):
        ScaledVocabParallelEmbedding()._apply(Unread(4, 3), mesh)


@spmd(ranks=2)
def test_never_silent_a_document_beyond_learned_positions_is_refused(mesh):
    """Ranks that have its last tokens would raise, and the others wait for them."""
    mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    model = parallelize_hf(build("gpt2", **GPT2), mesh)
    batch = {key: torch.arange(64)[None] % 48 for key in ("input_ids", "labels")}
    with pytest.raises(ValueError, match=r"one of 64 in row 0 for a .*GPT2LMHeadModel with 40"):
        causal_lm_loss(model, batch, mesh)
    positions = torch.arange(64)[None] % 32
    assert causal_lm_loss(model, {**batch, "position_ids": positions}, mesh) > 0


def test_never_silent_a_backend_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"got backend='inductr': name one of aot_eager, "):
        Compile("inductr")


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("mamba2", {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 2}),
        ("opt", {"hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2, "dropout": 0.0}),
        ("gemma3n_text", {**SHAPE, "head_dim": 8, "intermediate_size": [16], "hidden_size": 8}),
    ],
)
def test_models_on_the_meta_device_are_surveyed_like_others(kind, shape):
    """Where no narrow copy can be made or run, too."""
    if kind == "gemma3n_text":
        shape |= {"layer_types": ["full_attention"], "num_kv_shared_layers": 0}
        shape |= {"vocab_size_per_layer_input": 48, "hidden_size_per_layer_input": 4}
        shape |= {"activation_sparsity_pattern": [0.0], "laurel_rank": 2}
    config = AutoConfig.for_model(kind, **{"vocab_size": 48, "num_hidden_layers": 1, **shape})
    model = AutoModelForCausalLM.from_config(config)
    with torch.device("meta"):
        on_meta = AutoModelForCausalLM.from_config(config)
    found, expected = survey_on_meta(on_meta), survey(model)
    assert not found.refused
    assert found.attentions == expected.attentions and found.recurrent == expected.recurrent


@pytest.mark.parametrize("kind", ["mamba2", "bamba"])
def test_large_models_of_states_on_the_meta_device_have_a_narrow_copy(kind):
    """Their own sizes: heads of a state times its width are so many times the model's width."""
    config = AutoConfig.for_model(kind, num_hidden_layers=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = survey_on_meta(model)
    assert not found.refused and len(found.recurrent) == 4
