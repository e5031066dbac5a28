"""MLA of transformers: unmodified models exchange latents, and are what they are on one device."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import install_mixers
from dtcp.huggingface.latents import exchange_latents, hands_on_latents
from dtcp.huggingface.registry import MIXER
from dtcp.mixer_metadata import batch_metadata
from dtcp.parallelize import Compile, SelectiveCheckpoint, parallelize_hf
from dtcp.parallelize.tensor_parallel import LatentHeads
from dtcp.sequence.documents import Documents
from dtcp.sequence.masks import Causal
from dtcp.softmax import AllGatherAttention
from dtcp.softmax.mixer import LatentAttention
from tests.harness.hf_models import build
from tests.harness.spmd import spmd
from tests.huggingface.test_huggingface import PADDED, assert_parity, assert_same_step

SMALL = {
    "q_lora_rank": None,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "head_dim": 4,
}
LATENT_ROW, KEY_ROW = 12 + 4, 4 * (10 + 5)
"""Numbers of a token: its latent and rotary key; keys and values of all heads."""


class Projection(nn.Linear):
    """A projection of one's own, which is called and not bypassed."""


def received_by_ring(traffic):
    return sum(op.received for name, op in traffic.by_op.items() if "ring_attention" in name)


def attentions(model):
    return [module for module in model.modules() if hasattr(module, "kv_b_proj")]


@pytest.mark.slow_where(lambda kind: kind != "deepseek_v3")
@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "minicpm3", "youtu"])
@spmd(ranks=2)
def test_mla_of_transformers_exchanges_latents(mesh, kind):
    """Loss and all gradients, packed and padded rows; keys are never sent."""
    change = {**SMALL, "q_lora_rank": 8} if kind in ("minicpm3", "youtu") else SMALL
    packed = assert_parity(kind, Degrees(cp=2), change=change)
    assert_parity(kind, Degrees(cp=2), rows=PADDED, attention=AllGatherAttention(), change=change)
    reference, model = build(kind, **change), build(kind, **change)
    for each in attentions(model):
        each.kv_b_proj.__class__ = Projection
    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    keys = assert_same_step(reference, parallelize_hf(model, on), on)
    assert received_by_ring(packed) * KEY_ROW == received_by_ring(keys) * LATENT_ROW > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
@spmd(ranks=4)
def test_mla_of_transformers_beside_tp_brings_a_latent_once_to_each_rank(mesh, kind):
    """Heads are split over tp; each of its ranks receives what all of them are made of."""
    degrees = Degrees(cp=2, tp=2)
    packed = assert_parity(kind, degrees, change=SMALL)
    reference, model = build(kind, **SMALL), build(kind, **SMALL)
    for each in attentions(model):
        each.kv_b_proj.__class__ = Projection
    on = ParallelMesh.from_degrees(degrees, "cpu")
    keys = assert_same_step(reference, parallelize_hf(model, on), on)
    assert received_by_ring(packed) * KEY_ROW == received_by_ring(keys) * 2 * LATENT_ROW > 0


@pytest.mark.slow
@spmd(ranks=4)
def test_mla_of_transformers_on_fsdp_compiled_and_recomputed(mesh):
    assert_parity("deepseek_v3", Degrees(dp_shard=2, cp=2), change=SMALL)
    options = {"compile": Compile("aot_eager"), "activation_checkpoint": SelectiveCheckpoint()}
    assert_parity("deepseek_v3", Degrees(cp=4), change=SMALL, **options)


def test_mla_in_a_copy_has_weights_of_its_own():
    reference, model = build("deepseek_v3", **SMALL), build("deepseek_v3", **SMALL)
    install_mixers(model)
    for each in attentions(model):
        exchange_latents(each)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.0)
    input_ids = torch.arange(1, 13)[None]
    call = {"input_ids": input_ids, "position_ids": torch.arange(12)[None]}
    metadata = batch_metadata(copied, Documents.single(1, 12))
    actual = copied(**call, attn_metadata=metadata).logits
    assert_close(actual, reference(input_ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_mla_is_known_by_how_it_makes_its_keys():
    model = build("deepseek_v3", **SMALL)
    assert all(map(hands_on_latents, attentions(model)))
    assert not hands_on_latents(build("llama").model.layers[0].self_attn)

    class Other(type(attentions(model)[0])):
        def expand_kv(self, kv_nope, k_rot):
            return super().expand_kv(kv_nope * 2, k_rot)

    attentions(model)[0].__class__ = Other
    assert [*map(hands_on_latents, attentions(model))] == [False, True]


@spmd(ranks=2)
def test_latents_handed_on_under_tp_have_gradients_summed_as_their_style_says(mesh):
    """Of what would be lost if ranks rounded their shares first."""
    for wide, left in ((False, 0.0), (True, 2.0**-10)):
        attention = nn.Module()
        attention.add_module(MIXER, LatentAttention(Causal()))
        attention.get_submodule(MIXER).wide = wide
        attention.expand_kv = lambda latent, rotary: (latent, rotary)
        LatentHeads()._apply(attention, mesh)
        inputs = [torch.ones(1, 1, 2, size).bfloat16().requires_grad_() for size in (12, 4)]
        outs = attention.expand_kv(*inputs)
        share = (1 + 2.0**-10, -1.0)[mesh.get_local_rank()]
        grads = torch.autograd.grad(outs, inputs, [torch.full_like(x, share) for x in outs])
        assert_close(grads, tuple(torch.full_like(x, left) for x in inputs), rtol=0, atol=0)
