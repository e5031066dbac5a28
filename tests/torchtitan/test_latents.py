"""MLA of torchtitan: an adopted DeepSeek-V3 exchanges latents, and computes what it did."""

from dtcp.torchtitan.attention import add_mixers
from dtcp.torchtitan.latents import exchange_latents_of

import pytest
from torch import distributed as dist
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import ParallelMesh
from dtcp.mixer_plan import apply_plan
from dtcp.pretrain.adopt import adopt_model
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import AllGatherAttention, RingAttention, UlyssesAttention
from dtcp.softmax.mixer import LatentAttention, SoftmaxAttention
from tests.harness import titan_models as titan
from tests.harness.parity import gradients
from tests.harness.spmd import spmd


def on_ranks(mesh, style):
    """An adopted model, its mixers of the kind that the style brings, and this rank's batch."""
    model = titan.build(adopt_model(titan.small(titan.deepseek_v3)))
    add_mixers(model)
    exchange_latents_of(model, style)
    apply_plan(model, mesh, {"layers.*.attention.inner_attention.mixer": style})
    tokens, documents = titan.rows()
    whole = {"input_ids": tokens, "position_ids": documents.position_ids()}
    on = ParallelMesh.of_sequence(mesh)
    return model, *shard_batch(whole, on, HeadTail, model=model, documents=documents)


@pytest.mark.slow_where(lambda style: not isinstance(style, RingAttention))
@pytest.mark.parametrize("style", [RingAttention(), AllGatherAttention()])
@spmd(ranks=2)
def test_mla_of_torchtitan_computes_what_it_did_and_exchanges_latents(mesh, style):
    expected, expected_grads = titan.titans_own(titan.small(titan.deepseek_v3))
    model, local, sharded = on_ranks(mesh, style)
    attention = next(iter(model.layers.values())).attention
    assert isinstance(attention.inner_attention.mixer, LatentAttention)
    with titan.settled(), count_traffic() as traffic:
        logits = model(
            local["input_ids"],
            positions=local["position_ids"],
            attention_masks=sharded.attn_metadata,
        )
    row = (attention.kv_lora_rank + attention.qk_rope_head_dim) * logits.element_size()
    assert traffic.received > 0 and traffic.received % row == 0
    (logits * sharded.shard(titan.cotangent(expected))).sum().backward()
    assert_close(logits.detach(), sharded.shard(expected))
    actual = gradients(model)
    for gradient in actual.values():
        dist.all_reduce(gradient)
    assert_close(actual, expected_grads)


@spmd(ranks=2)
def test_mla_of_torchtitan_by_heads_keeps_its_keys(mesh):
    model, _, _ = on_ranks(mesh, UlyssesAttention())
    mixers = [block.attention.inner_attention.mixer for block in model.layers.values()]
    assert all(isinstance(mixer, SoftmaxAttention) for mixer in mixers)
