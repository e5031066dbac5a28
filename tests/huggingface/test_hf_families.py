"""Families of transformers whose layers need more than the attention registry, held against
themselves on one device: recurrent layers, layers that hand on no metadata, positions of their own.
"""

import inspect
import itertools

import pytest
import torch
from torch.testing import assert_close

from dtcp.check.checked_hf import CheckedHuggingFaceModel
from dtcp.check.parity import CheckOptions, compare, seeded
from dtcp.check.true_fp64 import TrueFP64
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import install_mixers, survey
from dtcp.huggingface.attend_by_name import CACHES, check_no_cache
from dtcp.huggingface.recurrent_forwards import WRITTEN_AGAIN
from dtcp.mixer_metadata import batch_metadata
from dtcp.parallelize import Compile
from dtcp.parallelize.plans.huggingface_tensor_plan import hf_tensor_plan
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from tests.harness.spmd import spmd
from tests.huggingface.test_huggingface import assert_parity

FAMILIES = {
    "stablelm": {},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "bart": {"dropout": 0.0, "is_encoder_decoder": False},
    "lfm2": {},
    "qwen3_next": {},
    "kimi_linear": {},
    "mamba2": {},
    "bamba": {},
    "nemotron_h": {},
    "minimax": {},
    "llama4_text": {},
    "falcon": {},
    "jetmoe": {},
    "recurrent_gemma": {},
    "zaya": {"cca_time0": 4, "cca_time1": 3, "attention_bias": True},
    "mamba": {},
    "falcon_mamba": {},
    "jamba": {},
    "t5": {"dropout_rate": 0.0},
    "bart of two sequences": {"dropout": 0.0},
    "bloom": {},
    "mpt": {},
    "falcon with a bias": {"alibi": True},
    "longcat_flash": {},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "zamba": {},
    "m2m_100": {
        **dict.fromkeys(("dropout", "activation_dropout", "attention_dropout"), 0.0),
        **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop"), 0.0),
    },
    "t5gemma": {},
    "switch_transformers": {"dropout_rate": 0.0, "router_jitter_noise": 0.0},
}
"""Layers that hand on a mask alone; positions from 1; positions of its own; a short convolution;
a delta rule with one decay a head, and with one a channel; Mamba-2 alone, beside attention and in
another family's layers; lightning attention; chunks; attention that is written out; a router that
sorts tokens; the RG-LRU beside attention; convolutions before attention, which are handed a mask
among others; Mamba, alone, with norms and beside attention; an encoder and a decoder; ALiBi;
experts that hand a token on; an encoder with one token's heads in two modules; blocks that share a
part; positions counted by ids; a mask that is made of ids; experts with places for some tokens."""
CHEAP = ("stablelm", "mamba2")
WITH_TRAFFIC = ("qwen3_next", "mamba")
ELSEWHERE = (
    *("bart", "mpt", "bloom", "longcat_flash", "switch_transformers"),
    *("kimi_linear", "lfm2", "bamba", "t5gemma"),
)
"""Eager and head-tail beside tp, here or in test_tp_heads.py; without tp compiled, in pieces or on
three ranks."""


def checked_family(kind):
    return CheckedHuggingFaceModel(kind.partition(" ")[0], FAMILIES.get(kind, {}))


def assert_step_equal(kind, degrees, *, layout=HeadTail, compile=None, ranks_per_node=0):
    """Assert that loss and gradients on packed rows are those of one device, in fp64."""
    checked = checked_family(kind)
    options = CheckOptions(degrees, layout=layout)
    mesh = ParallelMesh.from_degrees(degrees, "cpu", ranks_per_node=ranks_per_node)
    result = compare(checked, options, mesh, compile)
    wrong = {name: error for name, error in result.errors.items() if not error <= 1e-5}
    assert not wrong, wrong
    return result


@pytest.mark.slow_where(lambda kind: kind not in CHEAP)
@pytest.mark.parametrize(
    "kind", [kind for kind in FAMILIES if kind not in WITH_TRAFFIC + ELSEWHERE]
)
@spmd(ranks=2)
def test_packed_rows_of_a_family_equal_the_unmodified_model(mesh, kind):
    assert_step_equal(kind, Degrees(cp=2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_next", "bamba", "bart", "mamba", "mpt", "t5gemma", "zaya"])
@spmd(ranks=3)
def test_three_ranks_of_a_family_equal_one_device(mesh, kind):
    assert_step_equal(kind, Degrees(cp=3), layout=Contiguous)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mamba", "mpt"])
@spmd(ranks=4)
def test_four_ranks_of_a_family_equal_one_device(mesh, kind):
    assert_step_equal(kind, Degrees(cp=4), layout=Contiguous)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_next", "mamba2", "longcat_flash"])
@spmd(ranks=4)
def test_two_tier_family_equals_one_device(mesh, kind):
    """The mesh gives its nodes to attention, latents, states and convolutions."""
    assert_step_equal(kind, Degrees(cp=4), layout=DocumentBalanced, ranks_per_node=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["bart", "roberta", "zamba", "t5gemma", "switch_transformers", "zaya"]
)
@spmd(ranks=4)
def test_tp_of_a_family_equals_one_device(mesh, kind):
    """Where transformers has no plan; test_tp_heads.py has the others."""
    assert_step_equal(kind, Degrees(cp=2, tp=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        *("stablelm", "qwen3_next", "bart", "mamba2", "falcon", "mamba", "bloom", "mpt"),
        *("longcat_flash", "switch_transformers", "recurrent_gemma"),
    ],
)
@spmd(ranks=2)
def test_compiled_family_equals_one_device(mesh, kind):
    result = assert_step_equal(kind, Degrees(cp=2), compile=Compile("aot_eager"))
    assert result.graphs.breaks == 0


@spmd(ranks=2)
def test_queries_scaled_by_position_have_that_of_their_document(mesh):
    """Llama 4 counts its input in layers without rotary positions, by steps of 8,192 tokens."""
    change = {"floor_scale": 4, "attn_scale": 0.5, "no_rope_layer_interval": 2}
    with TrueFP64():
        assert_parity("llama4_text", Degrees(cp=2), change=change)


@spmd(ranks=2)
def test_recurrent_layers_move_states_and_halos_only(mesh):
    """By the formulas of the styles; what the layer has for each token stays where it is."""
    layer = CheckedHuggingFaceModel("qwen3_next").build().model.layers[0].linear_attn
    by_layer = assert_step_equal("qwen3_next", Degrees(cp=2)).by_layer
    received = {
        name.removeprefix("model.layers.0.linear_attn."): count.received
        for name, count in by_layer.items()
        if "linear_attn" in name
    }
    halo = (layer.conv_kernel_size - 1) * layer.conv_dim * 8
    maps = layer.num_v_heads * layer.head_k_dim * (layer.head_k_dim + layer.head_v_dim) * 8
    assert received["dtcp_conv, forward"] == received["dtcp_conv, backward"] == halo
    assert received["dtcp_rule, forward"] == 2 * maps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *itertools.product(("qwen3_next", "mamba2"), (PerDocument, BlockBalanced)),
        *itertools.product(
            ("lfm2", "kimi_linear", "mamba"), (PerDocument, BlockBalanced, DocumentBalanced)
        ),
    ],
)
@spmd(ranks=2)
def test_recurrent_layers_run_on_the_pieces_of_any_layout(mesh, kind, layout):
    assert_step_equal(kind, Degrees(cp=2), layout=layout)


@spmd(ranks=2)
def test_mamba_moves_a_scale_and_a_write_for_each_number_of_its_states(mesh):
    """Of each of the two segments of a rank; and w - 1 tokens for its convolution."""
    layer = checked_family("mamba").build().backbone.layers[0].mixer
    by_layer = assert_step_equal("mamba", Degrees(cp=2)).by_layer
    rule, conv = (
        by_layer[f"backbone.layers.0.mixer.{name}, forward"].received
        for name in ("dtcp_rule", "dtcp_conv")
    )
    assert rule == 2 * layer.intermediate_size * layer.ssm_state_size * 2 * 8
    assert conv == (layer.conv_kernel_size - 1) * layer.intermediate_size * 8


@pytest.mark.parametrize("kind", ["recurrent_gemma", "zaya"])
def test_layer_that_is_written_again_equals_the_one_that_it_stands_for(kind):
    """Its whole row, in true fp64: output and every gradient, that of its input among them."""
    plain, model = (seeded(checked_family(kind)) for _ in range(2))
    install_mixers(model)
    name = next(n for n, m in plain.named_modules() if type(m).__name__ in WRITTEN_AGAIN)
    own, layer = plain.get_submodule(name), model.get_submodule(name)
    x = torch.randn(2, 37, plain.config.hidden_size, dtype=torch.float64)
    positions = {"position_ids": torch.arange(37).expand(2, -1)} if kind != "zaya" else {}
    ours = {**positions, "attn_metadata": batch_metadata(model, Documents.single(2, 37))}
    theirs = {**positions, "attention_mask": None, "use_cache": False}
    if kind == "zaya":
        # Called past_key_values before transformers 5.24.
        theirs = dict.fromkeys(inspect.signature(own.forward).parameters.keys() & set(CACHES))
    outputs, gradients = [], []
    for module, given in ((own, theirs), (layer, ours)):
        leaf = x.clone().requires_grad_()
        with TrueFP64():
            out = module(leaf, **given)
        out = [part for part in out if part is not None]
        cotangents = [torch.linspace(-1, 1, part.numel()).view_as(part).sin() for part in out]
        sources = (leaf, *module.parameters())
        outputs.append(out)
        gradients.append(torch.autograd.grad(out, sources, [c.double() for c in cotangents]))
    assert_close(outputs[1], outputs[0])
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ["past_key_values", "cache", "layer_past", "cache_params"])
def test_cache_of_a_layer_that_is_written_again_is_refused_by_any_of_its_names(name):
    with pytest.raises(ValueError, match="got a cache of type list in Identity"):
        check_no_cache(torch.nn.Identity(), {name: []})
    arguments = {name: None, "scaling": 1.0}
    check_no_cache(torch.nn.Identity(), arguments)
    assert arguments == {"scaling": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba", "zamba"])
def test_mamba_layer_equals_the_one_that_it_stands_for(kind):
    """In true fp64, output and every gradient."""
    plain, model = (seeded(CheckedHuggingFaceModel(kind)) for _ in range(2))
    install_mixers(model)
    name = next(n for n, m in plain.named_modules() if type(m).__name__.endswith("MambaMixer"))
    own, layer = plain.get_submodule(name), model.get_submodule(name)
    x, cotangent = torch.randn(2, 2, 37, plain.config.hidden_size, dtype=torch.float64).unbind()
    with TrueFP64():
        expected = own(x)
    (expected * cotangent).sum().backward()
    metadata = batch_metadata(model, Documents.single(2, 37))
    with TrueFP64():  # Norms, too, would compute in fp32.
        actual = layer(x, attn_metadata=metadata)
    (actual * cotangent).sum().backward()
    assert_close(actual, expected)
    for key, parameter in own.named_parameters():
        if parameter.grad is not None:
            assert_close(layer.get_parameter(key).grad, parameter.grad)


def test_survey_finds_the_kernels_of_recurrent_layers():
    """A convolution and a rule in the recurrent layer, attention in the other."""
    model = CheckedHuggingFaceModel("qwen3_next").build()
    before = {name: module.forward for name, module in model.named_modules()}
    surveyed = survey(model)
    assert {each.name: dict(each.arguments) for each in surveyed.recurrent} == {
        "model.layers.0.linear_attn.dtcp_conv": {"width": 4},
        "model.layers.0.linear_attn.dtcp_rule": {"normalize": True},
    }
    assert [each.name for each in surveyed.attentions] == ["model.layers.1.self_attn"]
    assert {name: module.forward for name, module in model.named_modules()} == before


def test_positions_that_count_from_behind_the_padding_are_found():
    checked = CheckedHuggingFaceModel("roberta", {**FAMILIES["roberta"], "pad_token_id": 3})
    assert survey(checked.build()).positions.offset == 4


@pytest.mark.parametrize("kind", ["bart of two sequences", "roberta"])
def test_a_model_of_few_positions_is_surveyed_on_as_many(kind):
    """Of 24 positions behind the padding's, where 37 tokens are run else."""
    change = {**FAMILIES[kind], "max_position_embeddings": 24}
    surveyed = survey(CheckedHuggingFaceModel(kind.partition(" ")[0], change).build())
    assert surveyed.refused == () and surveyed.attentions


def test_a_model_without_positions_is_called_through_its_own_forward():
    """Its decoder, called by itself, would count a shard from 0."""
    model = checked_family("bart").build()
    install_mixers(model)
    documents = Documents(((5, 4),), 9)
    metadata = batch_metadata(model, documents)
    input_ids = torch.arange(1, 10)[None]
    with pytest.raises(ValueError, match="got a call of BartLearnedPositionalEmbedding"):
        model.model.decoder(input_ids=input_ids, attn_metadata=metadata)
    whole = {"position_ids": documents.position_ids(), "attn_metadata": metadata}
    first = model(input_ids=input_ids, **whole).logits[:, 5:]
    alone = batch_metadata(model, Documents(((4,),), 4))
    second = model(
        input_ids=input_ids[:, 5:], position_ids=torch.arange(4)[None], attn_metadata=alone
    ).logits
    assert_close(first, second)


def test_a_kernel_that_no_mixer_stands_for_is_refused_by_name():
    refused = survey(CheckedHuggingFaceModel("xlstm").build()).refused
    assert any("mlstm_backend (xLSTMBackend): tokens meet in it" in each for each in refused)


@pytest.mark.parametrize("kind", ["bert", "modernbert", "roberta"])
def test_encoder_sees_no_padding(kind):
    """Held against transformers' own mask of padding."""
    change = FAMILIES["roberta"] if kind != "modernbert" else {}
    plain, model = (seeded(CheckedHuggingFaceModel(kind, change)) for _ in range(2))
    install_mixers(model)
    documents = Documents(((7,), (12,)), 12)
    is_token = documents.document() >= 0
    input_ids = torch.randint(1, 60, (2, 12)).where(is_token, 0)
    expected = plain(input_ids=input_ids, attention_mask=is_token.long()).logits
    metadata = batch_metadata(model, documents)
    given = {"position_ids": documents.position_ids(), "attn_metadata": metadata}
    assert_close(model(input_ids=input_ids, **given).logits[is_token], expected[is_token])


@pytest.mark.parametrize("kind", ["gemma3n_text", "neomme", "gemma4"])
def test_tp_of_a_family_that_computes_with_weights_of_layers_it_does_not_call_is_refused(kind):
    model = CheckedHuggingFaceModel(kind, {}).build()
    with pytest.raises(ValueError, match=r"where it is called|which reads its weight"):
        hf_tensor_plan(model, 2)


@pytest.mark.parametrize("kind", ["qwen3_next", "mamba2"])
@pytest.mark.slow_where(lambda kind: kind != "qwen3_next")
def test_recurrent_model_of_bf16_is_surveyed_as_one_of_fp32(kind):
    """Its decays are fp32 all the same."""
    surveyed = [survey(checked_family(kind).build().to(x)) for x in (torch.float32, torch.bfloat16)]
    assert surveyed[0].recurrent == surveyed[1].recurrent and not surveyed[1].refused
