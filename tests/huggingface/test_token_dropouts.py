"""Dropout of transformers' models and of adapters on a mesh, held against one device's by hand."""

from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForMaskedLM

from dtcp.compile import count_graphs
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import causal_lm_loss, documents_of_hf_batch, survey
from dtcp.huggingface.meta_device import survey_on_meta
from dtcp.parallelize import Compile, FullCheckpoint, load_hf, parallelize_hf
from dtcp.parallelize.plans.adapters import adapted_model
from dtcp.token_dropout import TokenDropout
from tests.harness.dropped import drop_by_token, keep
from tests.harness.hf_models import build, config_of
from tests.harness.parity import assert_gradients, gradients, summed
from tests.harness.spmd import spmd
from tests.huggingface.test_huggingface import BOUND, PACKED, a_batch, assert_step_is, one_device
from tests.huggingface.test_lora import DENSE, adapted, on_mesh_of

SEED = 5
HIDDEN = {
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.2, "embd_pdrop": 0.3},
    "gpt_neox": {"hidden_dropout": 0.2},
}


def lora(targets=DENSE, kind="llama", **change):
    return adapted(kind, targets, config={"lora_dropout": 0.3}, **change)


def by_hand(model, drop=drop_by_token):
    """Loss and gradients of one device, whose masks are worked out in numpy."""
    batch = a_batch(PACKED)
    places = [
        (row, first)
        for row, lengths in enumerate(documents_of_hf_batch(batch).lengths)
        for first in np.cumsum((0, *lengths))[:-1]
    ]
    rows, first = (np.array(each)[:, None] for each in zip(*places, strict=True))
    tokens = first + np.arange(max(map(max, PACKED)))
    rows = rows + np.zeros_like(tokens)
    torch.manual_seed(SEED)
    seed = int(torch.randint(2**63 - 1, (1,)))
    drop(adapted_model(model), seed, rows, tokens)
    return one_device(model, batch), gradients(model)


def assert_same_masks(model, reference, degrees, **options):
    parallel, mesh = on_mesh_of(model, degrees, **options)
    assert any(isinstance(x, TokenDropout) and x.p for x in parallel.modules())
    expected = by_hand(reference)
    torch.manual_seed(SEED + mesh.rank("cp"))  # Ranks go by the first one's.
    assert_step_is(expected, parallel, mesh)


@pytest.mark.parametrize("degrees", [Degrees(cp=2), Degrees(tp=2), Degrees(dp_shard=2)])
@spmd(ranks=2)
def test_lora_drops_by_token(mesh, degrees):
    assert_same_masks(lora(), lora(), degrees)


@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("degrees", [Degrees(cp=2), Degrees(tp=2)])
@spmd(ranks=2)
def test_hidden_states_drop_by_token(mesh, kind, degrees):
    assert_same_masks(build(kind, **HIDDEN[kind]), build(kind, **HIDDEN[kind]), degrees)


@spmd(ranks=4)
def test_lora_drops_by_token_on_cp_beside_tp_in_blocks_that_are_compiled_and_recomputed(mesh):
    options = {"compile": Compile("aot_eager"), "activation_checkpoint": FullCheckpoint()}
    assert_same_masks(lora(), lora(), Degrees(cp=2, tp=2), **options)


@pytest.mark.parametrize("compiled", [False, True])
@spmd(ranks=1)
def test_block_that_calls_a_dropout_twice_drops_the_same_again(mesh, compiled):
    """In a graph that recomputes, dynamo would let nobody count the calls."""
    options = {"resid_pdrop": 0.2, "embd_pdrop": 0.0, "attention_dropout": 0.0}
    how = {"compile": Compile("aot_eager") if compiled else None}
    models = (build("phi", **options) for _ in range(2))
    assert_same_masks(*models, Degrees(), activation_checkpoint=FullCheckpoint(), **how)


@spmd(ranks=2)
def test_blocks_that_transformers_recomputes_drop_the_same_again(mesh):
    model = lora()
    model.gradient_checkpointing_enable()
    assert_same_masks(model, lora(), Degrees(cp=2))


def by_function(patch, model, places):
    """Let torch's dropout drop by token where an unmodified model calls it, once per call.

    Args:
        places: of a module's name, its number of the batch, and rows and tokens.
    """
    calls, running = {}, []

    def dropout(x, p, training):
        if p == 0:
            return x
        name = f"{running[-1]}.dropout"
        calls[name] = calls.get(name, -1) + 1
        mask = keep(places(name)[0], name, *places(name)[1:], x.shape[-1], p, calls[name])
        return x * mask.view(x.shape) / (1 - p)

    for name, module in model.named_modules():
        if vars(module).get("dropout"):
            module.register_forward_pre_hook(lambda *_, name=name: running.append(name))
            module.register_forward_hook(lambda *_: running.pop() and None)
    patch.setattr(nn.functional, "dropout", dropout)


@pytest.mark.parametrize("how", ["eager", "compiled", "recomputed"])
@spmd(ranks=1)
def test_dropout_that_a_model_calls_as_a_function_drops_by_token(mesh, how):
    assert_opt_drops_by_token(Degrees(), how)


@spmd(ranks=4)
def test_dropout_as_a_function_drops_by_token_on_cp_beside_tp(mesh):
    assert_opt_drops_by_token(Degrees(cp=2, tp=2), "compiled")


def assert_opt_drops_by_token(degrees, how):
    options = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.2}
    reference, model = (build("opt", **options) for _ in range(2))
    kinds = {"compile": Compile("aot_eager")} if how == "compiled" else {}
    kinds |= {"activation_checkpoint": FullCheckpoint()} if how != "eager" else {}
    parallel, mesh = on_mesh_of(model, degrees, **kinds)
    assert sum(isinstance(x, TokenDropout) for x in parallel.modules()) == 2
    with pytest.MonkeyPatch.context() as patch:
        drop = partial(by_function, patch)
        expected, grads = by_hand(reference, lambda model, *at: drop(model, lambda _: at))
    torch.manual_seed(SEED)
    loss = causal_lm_loss(parallel, a_batch(PACKED), mesh)
    loss.backward()
    assert_close(summed(loss, mesh), expected, rtol=BOUND, atol=0.0)
    assert_gradients(parallel, grads, BOUND, floor=0.1)


@spmd(ranks=2)
def test_encoder_and_decoder_drop_what_they_call_as_a_function(mesh):
    """BART's: its encoder and decoder drop embeddings, in forwards that have decorators."""
    sizes = ("d_model", "encoder_ffn_dim", "decoder_ffn_dim")
    options = {**dict.fromkeys(sizes, 32), "encoder_layers": 2, "decoder_layers": 2}
    options |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.2}
    options |= {"decoder_start_token_id": 0, "activation_dropout": 0.0}
    reference, model = (build("bart", head="Seq2SeqLM", **options) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    batch = {
        key: torch.randint(1, 64, (2, length), generator=generator)
        for key, length in (("input_ids", 24), ("labels", 20))
    }
    torch.manual_seed(SEED)
    drawn = {
        part: (int(torch.randint(2**63 - 1, (1,))), *np.indices((2, length)))
        for part, length in (("encoder", 24), ("decoder", 20))
    }
    with pytest.MonkeyPatch.context() as patch:
        by_function(patch, reference, lambda name: drawn[name.split(".")[1]])
        expected = reference(**batch).loss
    expected.backward()
    model, mesh = on_mesh_of(model, Degrees(cp=2))
    torch.manual_seed(SEED)
    loss = causal_lm_loss(model, batch, mesh)
    loss.backward()
    assert_close(summed(loss, mesh), expected.detach(), rtol=BOUND, atol=0.0)
    assert_gradients(model, gradients(reference), BOUND, floor=0.1)


@spmd(ranks=1)
def test_block_that_calls_a_dropout_twice_and_transformers_recomputes(mesh):
    """Eagerly it drops the same again; of a graph dynamo would say that a side effect is unsafe."""
    options = {"resid_pdrop": 0.2, "embd_pdrop": 0.0, "attention_dropout": 0.0}
    model, compiled = (build("phi", **options) for _ in range(2))
    model.gradient_checkpointing_enable()
    assert_same_masks(model, build("phi", **options), Degrees())
    compiled, mesh = on_mesh_of(compiled, Degrees(), compile=Compile("aot_eager"))
    compiled.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"PhiDecoderLayer with gradient_checkpointing=True"):
        causal_lm_loss(compiled, a_batch(PACKED), mesh)


@spmd(ranks=2)
def test_model_on_the_meta_device_drops_the_channels_of_its_ranks_of_tp(mesh):
    reference = build("gpt2", **HIDDEN["gpt2"])
    with torch.device("meta"):
        model = type(reference)(deepcopy(reference.config)).to(torch.float64).train()
    mesh = ParallelMesh.from_degrees(Degrees(tp=2), "cpu")
    parallelize_hf(model, mesh)
    load_hf(model, reference.state_dict(), device="cpu")
    expected = by_hand(reference)
    torch.manual_seed(SEED)
    assert_step_is(expected, model, mesh)


@pytest.mark.parametrize("hidden", [32, 256])
def test_channels_of_a_model_on_the_meta_device_are_its_own(hidden):
    """Its narrow copy has others; of 8 channels per head as many in two places."""
    options = {"embedding_dropout": 0.1, "mlp_dropout": 0.2, "local_attention": 8}
    sizes = {"hidden_size": hidden, "intermediate_size": 5 * hidden, "head_dim": hidden // 4}
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config_of("modernbert", **sizes, **options))
    found = survey_on_meta(model)
    assert not found.refused
    assert [x.width for x in found.dropouts] == [hidden] + 2 * [5 * hidden]


def test_rates_of_attention_are_named_as_a_config_has_them():
    options = {"d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_model": 32}
    t5 = build("t5", head="Seq2SeqLM", dropout_rate=0.2, decoder_start_token_id=0, **options)
    bert = build("bert", head="MaskedLM", attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.1)
    for model, field in ((t5, "dropout_rate"), (bert, "attention_probs_dropout_prob")):
        said = [each for each in survey(model).refused if "Attention)" in each]
        assert said and all(each.endswith(f"set config.{field} = 0.0.") for each in said)


def test_what_would_not_drop_by_token_is_refused_by_name():
    def refused(kind, head="CausalLM", **change):
        return survey(build(kind, head=head, **change)).refused

    unknown = build("llama")
    unknown.model.drop = nn.Dropout(0.1)
    (said,) = survey(unknown).refused
    assert said.startswith("model.drop (Dropout): dropout=0.1 in training would depend on the mesh")
    quiet = {"attention_probs_dropout_prob": 0.0}
    (said,) = refused("bloom", hidden_dropout=0.1, attention_dropout=0.0)
    assert "BloomForCausalLM is random in training" in said
    shared = refused("albert", "MaskedLM", embedding_size=16, hidden_dropout_prob=0.1, **quiet)
    assert any("albert_layer_groups.0 runs" in said for said in shared)
    one_for_all = build("gpt2", **HIDDEN["gpt2"])
    for block in one_for_all.transformer.h:
        block.mlp.dropout = one_for_all.transformer.h[0].mlp.dropout
    (said,) = survey(one_for_all).refused
    assert "h.0.mlp.dropout" in said and "the same in each of 2 places" in said


def test_dropouts_of_other_adapters_of_a_layer_drop_by_token_too():
    model = lora()
    model.add_adapter("other", model.peft_config["default"])
    found = survey(adapted_model(model))
    assert not found.refused and len(found.dropouts) == 2 * 2 * len(DENSE)


@spmd(ranks=1)
def test_blocks_of_one_kind_that_drop_share_a_graph(mesh):
    model, mesh = on_mesh_of(lora(num_hidden_layers=5), Degrees(), compile=Compile("aot_eager"))
    with count_graphs() as counted:
        for _ in range(2):
            causal_lm_loss(model, a_batch(PACKED), mesh).backward()
    assert counted.graphs == 2  # the first one's input has no gradient
    before = torch.get_rng_state()
    causal_lm_loss(model.eval(), a_batch(PACKED), mesh)
    assert torch.equal(torch.get_rng_state(), before)


def encoder_and_decoder():
    """T5 that drops hidden states, twice by one module; and so do adapters of its attention."""
    options = {"d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = build("t5", head="Seq2SeqLM", d_model=32, dropout_rate=0.2, **options)
    for module in model.modules():
        if type(module).__name__ == "T5Attention":
            module.dropout = 0.0  # The config has one rate for both.
    return adapted(model=model, targets=("q", "k", "v", "o"), config={"lora_dropout": 0.3})


@spmd(ranks=2)
def test_two_sequences_drop_by_tokens_of_their_own(mesh):
    """Cross attention's adapters of keys and values drop those of the encoder."""
    generator = torch.Generator().manual_seed(0)
    batch = {
        key: torch.randint(1, 64, (2, length), generator=generator)
        for key, length in (("input_ids", 24), ("labels", 20))
    }
    reference = encoder_and_decoder()
    base = adapted_model(reference)
    torch.manual_seed(SEED)
    for part, length in (("encoder", 24), ("decoder", 20)):
        drawn = int(torch.randint(2**63 - 1, (1,)))
        places = np.indices((2, length))
        drop_by_token(base.get_submodule(part), drawn, *places, prefix=f"{part}.")
        if part == "encoder":
            of_memory = drawn, *places
    for name, module in base.named_modules():
        if name.endswith(("EncDecAttention.k", "EncDecAttention.v")):
            drop_by_token(module, *of_memory, prefix=f"{name}.")
    expected = reference(**batch).loss
    expected.backward()

    model, mesh = on_mesh_of(encoder_and_decoder(), Degrees(cp=2))
    torch.manual_seed(SEED)
    loss = causal_lm_loss(model, batch, mesh)
    loss.backward()
    assert_close(summed(loss, mesh), expected.detach(), rtol=BOUND, atol=0.0)
    assert_gradients(model, gradients(reference), BOUND)


@pytest.mark.parametrize("targets", [["lm_head"], r".*EncDecAttention\.k"])
@spmd(ranks=1)
def test_adapters_of_one_part_alone_drop_by_the_tokens_of_what_they_read(mesh, targets):
    """Encoder and decoder are cut by themselves, and either may have no dropout of its own."""
    options = {"d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    base = build("t5", head="Seq2SeqLM", d_model=32, dropout_rate=0.0, **options)
    config = {"lora_dropout": 0.3, "target_modules": targets}
    model, mesh = on_mesh_of(adapted(model=base, config=config), Degrees())
    ids = torch.arange(24).view(1, 24)
    losses = [causal_lm_loss(model, {"input_ids": ids, "labels": ids}, mesh) for _ in "ab"]
    assert losses[0] != losses[1]
