"""DeepSeek-V3.2 and its like: unmodified models, whose indexers pick what latents they read."""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.testing import assert_close

from dtcp.distributed.mesh import Degrees
from dtcp.huggingface import install_mixers
from dtcp.huggingface.picking_attention import INDEXER
from dtcp.huggingface.registry import MIXER
from dtcp.mixer_metadata import batch_metadata
from dtcp.parallelize import Compile, SelectiveCheckpoint
from dtcp.parallelize.plans.huggingface_tensor_plan import hf_tensor_plan
from dtcp.parallelize.plans.mixer_styles import carried_out_by
from dtcp.parallelize.tensor_parallel import LatentHeads
from dtcp.sequence.documents import Documents
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import AllGatherAttention, HaloAttention, RingAttention, UlyssesAttention
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.sparse_latent import LightningIndexer, SparseLatentAttention, SparseLatentCP
from tests.harness.hf_models import build
from tests.harness.spmd import spmd
from tests.huggingface.test_huggingface import PADDED, assert_parity

SMALL = {
    "q_lora_rank": 8,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "experts_implementation": "batched_mm",
    "index_topk": 6,
    # With so many no score is 0: torch.topk picks any of equal ones, and an indexer the first.
    "index_n_heads": 16,
    "index_head_dim": 8,
}
KINDS = {
    "deepseek_v32": SMALL,
    "glm_moe_dsa": {
        **SMALL,
        "num_hidden_layers": 3,
        "index_topk_pattern": "FSF",
    },
    "axk2": {**SMALL, "gated_norm_rank": 4},
    "hy_v4": {**SMALL, "num_hidden_layers": 3},
    # The last layer has a window instead, and heads of its own.
    "dots3_note_text": {
        **SMALL,
        "num_hidden_layers": 3,
        "shared_experts_intermediate_size": 24,
        "head_dim": 10,
        "sliding_window": 7,
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 8,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 10,
        "swa_qk_nope_head_dim": 6,
        "swa_v_head_dim": 5,
    },
}
READ_AND_PICK = {
    "deepseek_v32": (2, 2),
    "glm_moe_dsa": (3, 2),
    "axk2": (2, 2),
    "hy_v4": (3, 2),
    "dots3_note_text": (2, 2),
}
"""How many layers read picked tokens, and how many pick them."""


@pytest.mark.slow_where(lambda kind: kind != "deepseek_v32")
@pytest.mark.parametrize("kind", KINDS)
@spmd(ranks=2)
def test_model_that_picks_latents_equals_the_unmodified_one(mesh, kind):
    """Loss and all gradients, of packed rows; what travels are latents and index keys."""
    traffic = assert_parity(kind, Degrees(cp=2), change=KINDS[kind])
    reading, picking = READ_AND_PICK[kind]
    there = traffic["dtcp::gather_shared_kv"]
    back = traffic["dtcp::gather_shared_kv_backward"]
    assert (there.calls, back.calls) == (reading + picking, reading)
    # A token in sight is received once there; and its gradient sent home from here.
    row, key = (12 + 4) * reading * 8, 8 * picking * 8
    assert there.received % (row + key) == back.received % row == 0
    tokens = torch.tensor([there.received // (row + key), back.received // row])
    dist.all_reduce(tokens)
    assert tokens[0] == tokens[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@spmd(ranks=4)
def test_model_that_picks_latents_beside_tp_and_fsdp(mesh, kind):
    change = KINDS[kind]
    assert_parity(kind, Degrees(cp=2, tp=2), change=change, rows=PADDED)
    assert_parity(kind, Degrees(dp_shard=2, cp=2), change=change, attention=AllGatherAttention())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@spmd(ranks=2)
def test_model_that_picks_latents_compiled_and_recomputed(mesh, kind):
    options = {"compile": Compile("aot_eager"), "activation_checkpoint": SelectiveCheckpoint()}
    assert_parity(kind, Degrees(cp=2), change=KINDS[kind], layout=PerDocument, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_have_the_mixers_that_they_need_and_compute_what_they_did(kind):
    reference, model = build(kind, **KINDS[kind]), build(kind, **KINDS[kind])
    survey = install_mixers(model)
    reading, picking = READ_AND_PICK[kind]
    numbers = [each.num_selected for each in survey.attentions]
    assert numbers == [6] * reading + [0] * (len(numbers) - reading)
    attentions = [layer.self_attn for layer in model.model.layers]
    assert sum(hasattr(each, INDEXER) for each in attentions) == picking
    for attention, number in zip(attentions, numbers, strict=True):
        expected = SparseLatentAttention if number else SoftmaxAttention
        assert type(attention.get_submodule(MIXER)) is expected
        indexer = getattr(attention, INDEXER, None)
        assert (indexer is None) == (attention.indexer is None)
        assert indexer is None or type(indexer) is LightningIndexer
    input_ids = torch.arange(1, 30)[None]
    call = {"input_ids": input_ids, "position_ids": torch.arange(29)[None]}
    metadata = batch_metadata(model, Documents.single(1, 29))
    actual = model(**call, attn_metadata=metadata).logits
    expected = reference(input_ids, use_cache=False).logits
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    actual.backward(cotangent)
    expected.backward(cotangent)
    for (name, ours), whole in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (whole.grad is None) == (".indexer." in name)
        if whole.grad is not None:
            assert float((ours.grad - whole.grad).abs().max() / whole.grad.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_tp_splits_heads_and_leaves_the_indexer_whole(kind):
    plan = hf_tensor_plan(build(kind, **KINDS[kind]), 2)
    layer = "model.layers.0.self_attn"
    assert plan[layer] == LatentHeads(sinks="sinks" if kind == "hy_v4" else "")
    of_heads = {name for name, style in plan.items() if isinstance(style, ColwiseParallel)}
    queries = "q_gate_proj" if kind == "axk2" else "q_b_proj"
    gates = {"hy_v4": ["gate_proj"], "dots3_note_text": ["g_proj"]}.get(kind, [])
    own = {name.removeprefix(f"{layer}.") for name in of_heads if name.startswith(layer)}
    assert own == {queries, "kv_b_proj", *gates}
    whole = {type(style) for name, style in plan.items() if name.startswith(f"{layer}.indexer")}
    assert whole and not any(issubclass(kind, ColwiseParallel | RowwiseParallel) for kind in whole)


def test_what_does_not_bring_all_that_may_be_picked_is_refused():
    picking, *_ = install_mixers(build("deepseek_v32", **SMALL)).attentions
    for style in (UlyssesAttention(), HaloAttention(7), RingAttention(tile=5)):
        with pytest.raises(ValueError, match=r"self_attn brings the latents of all .* leave att"):
            carried_out_by(picking, style)
    style = RingAttention(ranks_per_node=2, reduce_dtype=torch.float32)
    same = SparseLatentCP(ranks_per_node=2, reduce_dtype=torch.float32)
    assert carried_out_by(picking, style) == same


def test_a_projection_with_more_than_a_weight_is_refused():
    class Projection(nn.Linear):
        """One of one's own, which would be bypassed."""

    model = build("deepseek_v32", **SMALL)
    model.model.layers[1].self_attn.kv_b_proj.__class__ = Projection
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn .*kv_b_proj is no plain"):
        install_mixers(model)
