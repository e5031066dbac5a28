"""The reference is right: against torch on what torch can do, finite differences on the rest."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tests.harness import packings, reference


@pytest.mark.parametrize("packing", packings.PACKINGS)
@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_packings_fit_their_row_at_every_number_of_shards(packing, num_shards):
    documents = packing(24, num_shards)
    assert all(sum(lengths) <= 24 and min(lengths, default=1) >= 1 for lengths in documents.lengths)


@pytest.mark.parametrize("rule", [reference.causal, reference.bidirectional, reference.Window(3)])
def test_attention_equals_dense_sdpa_where_every_query_sees_a_key(rule):
    documents = packings.across_borders(12, 2)
    q, k, v = packings.qkv(documents)
    visible = reference.visible(documents.lengths, 12, rule)
    out, _ = reference.attention(q, k, v, visible)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=visible[:, None], enable_gqa=True
    ).transpose(1, 2)
    grad = torch.randn_like(out)
    assert_close(out, expected)
    inputs = (q, k, v)
    assert_close(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    )


def test_gradients_hold_with_softcap_sink_and_blind_queries():
    documents = packings.last_shard_padding(6, 3)
    q, k, v = packings.qkv(documents, head_dim=3)
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    visible = reference.visible(documents.lengths, 6, reference.causal)

    def out_and_finite_lse(q, k, v, sink):
        out, lse = reference.attention(q, k, v, visible, softcap=2.0, sink=sink)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(out_and_finite_lse, (q, k, v, sink), fast_mode=True)


def test_query_that_sees_nothing_has_zero_out_and_lse_minus_infinity():
    documents = packings.last_shard_padding(6, 3)
    q, k, v = packings.qkv(documents)
    visible = reference.visible(documents.lengths, 6, reference.causal)
    out, lse = reference.attention(q, k, v, visible)
    blind = ~visible.any(dim=-1)
    assert blind.any()
    assert (out[blind] == 0).all() and (lse[blind] == -torch.inf).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_sink_scales_the_output_by_its_share():
    documents = packings.one_document(6, 1)
    q, k, v = packings.qkv(documents)
    sink = torch.randn(4, dtype=torch.float64)
    visible = reference.visible(documents.lengths, 6, reference.causal)
    without, lse = reference.attention(q, k, v, visible)
    out, same_lse = reference.attention(q, k, v, visible, sink=sink)
    assert_close(out, without * torch.sigmoid(lse - sink)[..., None])
    assert_close(lse, same_lse)


def test_rules_say_what_they_say():
    def row(rule, query, lengths=((6, 2),)):
        return reference.visible(lengths, 9, rule)[0, query].nonzero().flatten().tolist()

    ids = ((0, 0, 0, -1, 1, 1, 1, 1, -1),)
    assert row(reference.causal, 3) == [0, 1, 2, 3]
    assert row(reference.causal, 7) == [6, 7]
    assert row(reference.bidirectional, 6) == [6, 7]
    assert row(reference.bidirectional, 8) == []
    assert row(reference.Window(2), 3) == [2, 3, 4, 5]
    assert row(reference.Window(2, right=1), 3) == [2, 3, 4]
    assert row(reference.Prefix(((3, 0),)), 1) == [0, 1, 2]
    assert row(reference.Prefix(((3, 0),)), 6) == [6]
    assert row(reference.Blocks(ids), 5) == [4, 5]
    assert row(reference.Blocks(ids), 3) == []
    assert row(reference.Either(reference.causal, reference.Blocks(ids)), 4) == [0, 1, 2, 3, 4, 5]
    assert row(reference.Both(reference.causal, reference.Window(2)), 4) == [3, 4]
