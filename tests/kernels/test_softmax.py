"""Attention on one device, and the pieces that every strategy is built from."""

import itertools
from math import log

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from dtcp.compile import count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.kernels.softmax import reference as reference_kernel
from dtcp.kernels.softmax.api import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
    attend,
    attend_backward,
    zeros_for,
)
from dtcp.kernels.softmax.block import block_attention, block_attention_backward
from dtcp.kernels.softmax.block_ranges import UNUSED, block_ranges
from dtcp.kernels.softmax.merge import NOTHING_SEEN, add_sink, merge_into, sink_gradient
from dtcp.mixer_metadata import batch_metadata
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.softmax.inputs import AttentionInputs
from dtcp.softmax.local import ATTENTION
from dtcp.softmax.metadata import local_metadata
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness import packings, reference
from tests.harness.attention_parity import (
    BOUND,
    CAUSAL,
    IMAGES_IN_WINDOW,
    MASK_CASES,
    SPLIT_CASES,
    WINDOW,
    Case,
    truth,
)

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, DIM = 2, 5, 7, 4, 2, 8
FORMS = [
    pytest.param(DIM, 0.0, id="aten kernel"),
    pytest.param(DIM, 1.5, id="softcap"),
    pytest.param(3, 0.0, id="another value dim"),
]
"""(value dim, softcap): the first goes to torch's kernel, the others cannot."""


def a_block(value_dim, dtype=torch.float64):
    shapes = [(BATCH, QUERIES, HEADS, DIM), (BATCH, KEYS, KV_HEADS, DIM)]
    shapes.append((BATCH, KEYS, KV_HEADS, value_dim))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def a_visible_table():
    """Some keys for each query; query 3 of row 0 sees none."""
    visible = torch.rand(BATCH, QUERIES, KEYS) < 0.5
    visible[..., 0] = True
    visible[0, 3] = False
    return visible


def bias_of(visible, dtype=torch.float64):
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf)


def dense(q, k, v, visible, **params):
    """The reference on blocks with fewer queries than keys."""
    missing = k.shape[1] - q.shape[1]
    padded = F.pad(q, (0, 0, 0, 0, 0, missing))
    out, lse = reference.attention(padded, k, v, F.pad(visible, (0, 0, 0, missing)), **params)
    return out[:, : q.shape[1]], lse[:, : q.shape[1]]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("value_dim", "softcap"), FORMS)
def test_block_equals_the_reference_forward_and_backward(value_dim, softcap, masked):
    """A query that sees nothing has output 0, lse -inf and no gradient."""
    q, k, v = a_block(value_dim)
    visible = a_visible_table() if masked else torch.ones(BATCH, QUERIES, KEYS, dtype=torch.bool)
    bias = bias_of(visible) if masked else None
    expected, expected_lse = dense(q, k, v, visible, scale=0.3, softcap=softcap)
    grad_out = torch.randn_like(expected)

    out, lse = block_attention(q, k, v, bias, scale=0.3, softcap=softcap)
    grads = block_attention_backward(grad_out, q, k, v, out, lse, bias, scale=0.3, softcap=softcap)
    assert_close(out, expected)
    assert_close(lse, expected_lse)
    assert_close(grads, torch.autograd.grad(expected, (q, k, v), grad_out))


@pytest.mark.parametrize(("value_dim", "softcap"), FORMS)
def test_block_of_bf16_gives_partial_results_in_fp32(value_dim, softcap):
    """A partial result rounded to bf16 loses what the merge needs (FlashAttention issue 2723)."""
    q, k, v = (x.detach().bfloat16() for x in a_block(value_dim))
    visible = a_visible_table()
    bias = bias_of(visible, torch.float32)
    out, lse = block_attention(q, k, v, bias, scale=0.3, softcap=softcap)
    grads = block_attention_backward(out, q, k, v, out, lse, bias, scale=0.3, softcap=softcap)
    assert {x.dtype for x in (out, lse, *grads)} == {torch.float32}
    assert_close(out, dense(q, k, v, visible, scale=0.3, softcap=softcap)[0].float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merge_of_parts_is_attention_over_their_union(dtype):
    """In any order; parts in which a query sees nothing have no weight."""
    q, k, v = (x.detach() for x in a_block(3))
    visible = a_visible_table()
    expected, expected_lse = dense(q, k, v, visible)
    parts = [slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 7)]
    for order in itertools.permutations(parts):
        out = torch.zeros(BATCH, QUERIES, HEADS, 3, dtype=dtype)
        lse = torch.full((BATCH, QUERIES, HEADS), NOTHING_SEEN, dtype=dtype)
        for part in order:
            part_out, part_lse = dense_part(q, k, v, visible, part)
            merge_into(out, lse, part_out.to(dtype), part_lse.to(dtype))
        assert_close(out, expected.to(dtype))
        assert_close(lse, expected_lse.to(dtype))


def dense_part(q, k, v, visible, part):
    """Attention to some of the keys, as many as there are queries at least."""
    hidden = visible.clone()
    hidden[:, :, : part.start] = False
    hidden[:, :, part.stop :] = False
    return dense(q, k, v, hidden)


def test_merge_holds_for_scores_beyond_exp():
    """exp(1000) is inf in fp64 (EasyContext issue 14)."""
    out, lse = torch.zeros(1, 1, 3, 1), torch.tensor([[[1000.0, -1000.0, NOTHING_SEEN]]])
    merge_into(out, lse, torch.ones(1, 1, 3, 1), torch.tensor([[[1000.0, 1000.0, -1000.0]]]))
    assert out.flatten().tolist() == [0.5, 1.0, 1.0]
    assert_close(lse, torch.tensor([[[1000.0 + log(2), 1000.0, -1000.0]]]))


def test_sink_is_one_more_key_whose_value_is_zero():
    q, k, v = a_block(DIM)
    sink = torch.randn(HEADS, dtype=torch.float64, requires_grad=True)
    visible = a_visible_table()
    expected, _ = dense(q, k, v, visible, sink=sink)
    grad_out = torch.randn_like(expected)
    out, lse = add_sink(*dense(q, k, v, visible), sink)
    assert_close(out, expected)
    (expected_grad,) = torch.autograd.grad(expected, sink, grad_out)
    assert_close(sink_gradient(grad_out, out, lse, sink), expected_grad)


@pytest.mark.parametrize("tile", [1, 3, 4, 7, 24, 100])
@pytest.mark.parametrize("packing", packings.PACKINGS)
def test_block_ranges_hold_every_key_that_is_seen_and_full_blocks_are_seen_by_all(packing, tile):
    """And no key before the first token, or after the last, that a query of the tile sees."""
    documents = packing(24, 4)
    keys = torch.tensor([0, 1, 2, 5, 6, 9, 10, 11, 15, 16, 17, 23])
    queries = torch.tensor([2, 3, 4, 8, 9, 11, 12, 13, 20, 21])
    token_index = F.pad(keys, (0, 4), value=UNUSED).to(torch.int32)
    coords = Coords.of(
        documents,
        prefix=packings.prefix_of_tokens(documents),
        block=packings.blocks_of_tokens(documents),
    )
    for mask_case in set(MASK_CASES) - set(SPLIT_CASES):
        first, last = (x[:, queries] for x in mask_case.mask.intervals(coords))
        seen = mask_case.visible(documents)[:, queries][:, :, keys]
        ranges = block_ranges(first, last, token_index, tile=tile)
        assert len(ranges) == documents.batch
        for row, row_ranges in enumerate(ranges.tolist()):
            assert_in_tiles(row_ranges, 10, tile)
            for q_start, q_stop, start, full_start, full_stop, stop in row_ranges:
                some = seen[row, q_start:q_stop].any(0).nonzero().flatten().tolist()
                assert not some or start <= some[0] <= some[-1] < stop
                sees = (last >= first)[row, q_start:q_stop]
                low = first[row, q_start:q_stop][sees].min() if sees.any() else 24
                high = last[row, q_start:q_stop][sees].max() if sees.any() else -1
                assert (keys[start:stop] >= low).all() and (keys[start:stop] <= high).all()
                assert start <= full_start <= full_stop <= stop
                assert seen[row, q_start:q_stop, full_start:full_stop].all()


def assert_in_tiles(ranges, length, tile):
    """Queries are in tiles that follow each other, of as many as may be at most."""
    bounds = [0, *(q_stop for _, q_stop, *_ in ranges)]
    assert bounds[-1] == length
    assert [q_start for q_start, *_ in ranges] == bounds[:-1]
    assert all(0 <= after - before <= tile for before, after in itertools.pairwise(bounds))


def test_keys_out_of_order_are_refused():
    interval = torch.zeros(1, 2, dtype=torch.int32)
    for token_index in ([0, 2, 1], [0, 1, 1]):
        with pytest.raises(ValueError, match="lined up by ascending token index"):
            block_ranges(interval, interval, torch.tensor(token_index))


@pytest.mark.parametrize("most_keys", [3, 8192])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize(
    "packing", [packings.two_rows, packings.equal_rows, packings.one_token_documents]
)
def test_attend_adds_keys_met_in_parts(monkeypatch, packing, softcap, most_keys):
    """Even keys and then odd keys: the merge of both is attention over all."""
    monkeypatch.setattr(reference_kernel, "MAX_BLOCK_KEYS", most_keys)
    documents, params = packing(24, 4), SoftmaxParams(0.4, softcap)
    case = Case(IMAGES_IN_WINDOW, packing, scale=0.4, softcap=softcap, sink=False, seq_len=24)
    expected = truth(case, 4)
    q, k, v = expected.inputs
    coords = Coords.of(documents, block=packings.blocks_of_tokens(documents))
    first, last = case.mask_case.mask.intervals(coords)
    queries = Queries(q, first, last)

    parts = []
    for parity in (0, 1):
        token_index = torch.arange(parity, 24, 2)
        ranges = block_ranges(first, last, token_index, tile=5)
        parts.append(Keys(k[:, token_index], v[:, token_index], token_index, ranges))
    state = OnlineSoftmax.empty(q, 8)
    for keys in parts:
        attend(state, queries, keys, params)
    out, lse = state.finish(None, q.dtype)
    assert_close(out, expected.out)

    dq, dk, dv = zeros_for(q), zeros_for(k), zeros_for(v)
    saved = SavedForward(expected.grad_out, out, lse)
    for keys in parts:
        grads = GradAccumulators(dq, zeros_for(keys.k), zeros_for(keys.v))
        attend_backward(grads, saved, queries, keys, params)
        dk[:, keys.token_index], dv[:, keys.token_index] = grads.dk, grads.dv
    assert_close((dq, dk, dv), expected.grads)


def on_one_device(case, compiled=False):
    """(output, gradients) of the mixer, without any mesh."""
    mixer = SoftmaxAttention(case.mask_case.mask, scale=case.scale, softcap=case.softcap)
    documents = case.documents(4)
    attn_metadata = batch_metadata(
        mixer,
        documents,
        prefix=packings.prefix_of_tokens(documents),
        block=packings.blocks_of_tokens(documents),
    )
    call = torch.compile(mixer, backend="aot_eager", fullgraph=True) if compiled else mixer
    expected = truth(case, 4)
    inputs = [x.to(case.dtype).requires_grad_() for x in expected.inputs]
    q, k, v, *sink = inputs
    out = call(q, k, v, attn_metadata, sink=sink[0] if sink else None)
    return out, torch.autograd.grad(out, inputs, expected.grad_out)


def relative_errors(case, out, grads):
    expected = truth(case, 4)
    pairs = zip((out, *grads), (expected.out, *expected.grads), strict=True)
    return [float((a.detach() - b).abs().max() / b.abs().max()) for a, b in pairs]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("mask_case", MASK_CASES, ids=lambda mask_case: f"{mask_case.mask}")
def test_attention_on_one_device_equals_the_reference(mask_case, dtype):
    for packing in packings.PACKINGS:
        case = Case(mask_case, packing, dtype=dtype)
        assert max(relative_errors(case, *on_one_device(case))) <= BOUND[dtype], case


@pytest.mark.parametrize(
    "shape",
    [
        {"softcap": 2.0},
        {"scale": 0.7},
        {"value_dim": 3},
        {"key_dim": 3, "value_dim": 5, "softcap": 4.0},
        {"kv_heads": 1},
        {"kv_heads": 4},
        {"heads": 6, "kv_heads": 3},
        {"sink": False},
    ],
    ids=repr,
)
def test_attention_of_other_shapes_equals_the_reference(shape):
    for dtype, bound in BOUND.items():
        case = Case(IMAGES_IN_WINDOW, packings.two_rows, dtype=dtype, **shape)
        assert max(relative_errors(case, *on_one_device(case))) <= bound


def test_long_rows_take_several_tiles():
    for packing in (packings.one_document, packings.two_rows):
        case = Case(WINDOW, packing, heads=2, kv_heads=1, seq_len=300)
        assert max(relative_errors(case, *on_one_device(case))) <= 1e-12


def test_scores_far_apart_stay_finite_and_exact():
    documents = packings.one_document(24, 4)
    q, k, v = packings.qkv(documents)
    q, k, mixer = 40 * q, 40 * k, SoftmaxAttention(CAUSAL.mask)
    out = mixer(q, k, v, batch_metadata(mixer, documents))
    expected, _ = reference.attention(q, k, v, CAUSAL.visible(documents))
    assert_close(out, expected)


@pytest.mark.parametrize("packing", [packings.one_document, packings.across_borders])
def test_bf16_is_as_exact_as_plain_attention_in_bf16(packing):
    """Error against fp64 truth, of output and gradients: at most 1.1 of torch's own kernel's."""
    case = Case(CAUSAL, packing, dtype=torch.bfloat16, sink=False, seq_len=192)
    expected = truth(case, 4)
    ours = relative_norms(on_one_device(case), expected)
    plain = relative_norms(plain_attention(case), expected)
    assert all(a <= 1.1 * b for a, b in zip(ours, plain, strict=True)), (ours, plain)


def plain_attention(case):
    """(output, gradients) of torch's attention, in the case's dtype."""
    expected = truth(case, 4)
    inputs = [x.to(case.dtype).requires_grad_() for x in expected.inputs]
    visible = case.mask_case.visible(case.documents(4))[:, None]
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in inputs), attn_mask=visible, enable_gqa=True
    ).transpose(1, 2)
    return out, torch.autograd.grad(out, inputs, expected.grad_out)


def relative_norms(result, expected):
    out, grads = result
    pairs = zip((out, *grads), (expected.out, *expected.grads), strict=True)
    return [float((a.detach().double() - b).norm() / b.norm()) for a, b in pairs]


def test_compiled_attention_is_one_graph_with_one_live_op():
    case = Case(IMAGES_IN_WINDOW, packings.two_rows)
    with count_graphs() as graphs, count_traffic() as traffic:
        result = on_one_device(case, compiled=True)
    assert (graphs.graphs, graphs.breaks) == (1, 0)
    assert traffic["dtcp::attention"].calls == traffic["dtcp::attention_backward"].calls == 1
    assert max(relative_errors(case, *result)) <= 1e-12


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("value_dim", [8, 3])
def test_op_keeps_the_contract_of_torch_library(sink, value_dim):
    """Schema, fake against real, autograd registration, and AOT dispatch."""
    q, k, v = packings.qkv(Documents.single(1, 12))
    intervals = KeyIntervals.of(CAUSAL.mask, Coords.of(Documents.single(1, 12)))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if sink else None
    v = v[..., :value_dim].detach().requires_grad_()
    metadata = local_metadata(intervals).tensors()
    x = AttentionInputs(q, k, v, sinks)
    if sink:
        bias = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        x = x._replace(bias=bias, slope=bias[:, 0].detach().requires_grad_())
    args = (*x, metadata, 0.3, 0.0, [], [], "auto", False, False)
    torch.library.opcheck(ATTENTION.forward, args)


def test_inputs_need_not_be_contiguous():
    """Nor the gradient: that of a sum is one number, expanded (NeMo issue 2384)."""
    case = Case(WINDOW, packings.two_rows, sink=False)
    mixer = SoftmaxAttention(WINDOW.mask)
    attn_metadata = batch_metadata(mixer, case.documents(4))
    inputs = [x.clone().requires_grad_() for x in truth(case, 4).inputs]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not turned[0].is_contiguous()
    grads = torch.autograd.grad(mixer(*turned, attn_metadata).sum(), inputs)
    out, _ = reference.attention(*inputs, WINDOW.visible(case.documents(4)))
    assert_close(grads, torch.autograd.grad(out.sum(), inputs))
