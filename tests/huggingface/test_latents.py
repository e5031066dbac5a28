"""MLA of transformers: unmodified models exchange latents, and are what they are on one device."""

import copy

import pytest
import torch
from torch import nn

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface.latents import hands_on_latents
from dtcp.huggingface.registry import MIXER
from dtcp.parallelize import Compile, SelectiveCheckpoint, parallelize_hf
from dtcp.softmax import AllGatherAttention, RingAttention, UlyssesAttention
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
LATENTS = 2 * (12 + 4) * 8
"""Bytes of a token's latents and rotary keys in both layers; keys and values have 704."""


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
    keys = assert_parity(kind, Degrees(cp=2), attention=UlyssesAttention(), change=change)
    ours = {name: packed.by_op[name] for name in packed.by_op if "ring_attention" in name}
    # Forward once, backward twice: latents again, and their gradients home.
    assert sum(op.received for op in ours.values()) % LATENTS == 0
    assert sum(op.received for op in ours.values()) < keys.received / 4


@pytest.mark.slow
@spmd(ranks=4)
def test_mla_of_transformers_on_fsdp_compiled_and_recomputed(mesh):
    assert_parity("deepseek_v3", Degrees(dp_shard=2, cp=2), change=SMALL)
    options = {"compile": Compile("aot_eager"), "activation_checkpoint": SelectiveCheckpoint()}
    assert_parity("deepseek_v3", Degrees(cp=4), change=SMALL, **options)


@spmd(ranks=2)
def test_mla_with_another_projection_or_a_copy_is_right_too(mesh):
    """A projection of one's own is called, not bypassed; a copy has weights of its own."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    reference, model = build("deepseek_v3", **SMALL), build("deepseek_v3", **SMALL)
    for each in (reference, model):
        attentions(each)[0].kv_b_proj.__class__ = Scaled
    parallelize_hf(model, on, RingAttention())
    kinds = [isinstance(each.get_submodule(MIXER), LatentAttention) for each in attentions(model)]
    assert kinds == [False, True]
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.0)
    assert_same_step(reference, copied, on)


def test_mla_is_known_by_how_it_makes_its_keys():
    model = build("deepseek_v3", **SMALL)
    assert all(map(hands_on_latents, attentions(model)))
    assert not hands_on_latents(build("llama").model.layers[0].self_attn)

    class Other(type(attentions(model)[0])):
        def expand_kv(self, kv_nope, k_rot):
            return super().expand_kv(kv_nope * 2, k_rot)

    attentions(model)[0].__class__ = Other
    assert [*map(hands_on_latents, attentions(model))] == [False, True]
