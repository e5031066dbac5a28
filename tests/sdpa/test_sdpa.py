"""Torch's own attention function on DTensors.

Sharded on the sequence it is attention over the whole sequence, in every layout, or it raises.
"""

from itertools import product

import pytest
import torch
from torch import distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as captured
from torch.testing import assert_close

from dtcp.distributed.ledger import count_traffic
from dtcp.sdpa.aten_rules import install_sdpa_rules
from dtcp.sdpa.local_shards import local_shards
from dtcp.sdpa.sequence_layout import sequence_layout
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention, UlyssesAttention
from tests.harness import packings
from tests.harness.attention_parity import refused
from tests.harness.spmd import spmd

SEQ_LEN = 32
compiled_or_not = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def whole_inputs(heads=8, kv_heads=4, batch=2, value_dim=8, dtype=torch.float64):
    """q, k, v as torch's attention takes them, [B, H, S, D], and a cotangent: on every rank."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, 8), (kv_heads, 8), (kv_heads, value_dim), (heads, value_dim)]
    return [
        torch.randn(batch, h, SEQ_LEN, d, generator=generator, dtype=torch.float64).to(dtype)
        for h, d in shapes
    ]


def attend(q, k, v, causal=True):
    """By a name of torch's function that a patch would miss, between per-token parts."""
    return -captured(-q, -k, -v, is_causal=causal, enable_gqa=True)


def maybe_compiled(function, compiled):
    return torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function


def sharded(tensors, mesh, placements, order=None):
    """DTensors of whole tensors whose sequence is put in the layout's order first."""
    order = torch.arange(SEQ_LEN) if order is None else order
    return [distribute_tensor(x[:, :, order], mesh, placements) for x in tensors]


def on_one_device(causal, documents=None, **shapes):
    """(output, gradients) of torch's attention on whole tensors, by position."""
    *inputs, grad = whole_inputs(**shapes)
    inputs = [x.requires_grad_() for x in inputs]
    mask = None
    if documents is not None:
        document = documents.document()[0]
        mask = document[:, None] == document
        mask = mask & torch.ones_like(mask).tril() if causal else mask
    out = F.scaled_dot_product_attention(
        *inputs, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=True
    )
    return out.detach(), torch.autograd.grad(out, inputs, grad)


def assert_equals_one_device(function, mesh, placements, *, causal=True, order=None, **shapes):
    """Run function(q, k, v) and its backward on DTensors, and compare whole tensors."""
    order = torch.arange(SEQ_LEN) if order is None else order
    documents = shapes.pop("documents", None)
    expected, expected_grads = on_one_device(causal, documents, **shapes)
    *inputs, grad = sharded(whole_inputs(**shapes), mesh, placements, order)
    inputs = [x.requires_grad_() for x in inputs]
    out = function(*inputs)
    assert out.placements == tuple(placements)
    grads = torch.autograd.grad(out, inputs, grad)
    assert_close(out.full_tensor().detach(), expected[:, :, order])
    for actual, right in zip(grads, expected_grads, strict=True):
        assert_close(actual.full_tensor(), right[:, :, order])


@compiled_or_not
@pytest.mark.parametrize("causal", [True, False])
@spmd(ranks=(1, 2, 4))
def test_bare_attention_on_a_sharded_sequence_is_over_the_whole(mesh, causal, compiled):
    install_sdpa_rules()
    function = maybe_compiled(lambda q, k, v: attend(q, k, v, causal), compiled)
    with count_traffic() as traffic:
        assert_equals_one_device(function, mesh, [Shard(2)], causal=causal)
    name = "dtcp::causal_sdpa" if causal else "dtcp::bidirectional_sdpa"
    assert traffic[name].calls == traffic[f"{name}_backward"].calls == 1


@spmd(ranks=3)
def test_shards_of_unequal_length_are_refused(mesh):
    install_sdpa_rules()
    q, k, v, _ = sharded(whole_inputs(), mesh, [Shard(2)])
    refused(r"divides it, got seq_len=32 on axes of \[3\] ranks", lambda: attend(q, k, v))


@compiled_or_not
@spmd(axes={"cp": 2, "tp": 2})
def test_bare_attention_with_heads_on_another_axis_is_over_the_whole(mesh, compiled):
    install_sdpa_rules()
    for causal in (True,) if compiled else (True, False):
        function = maybe_compiled(lambda q, k, v, c=causal: attend(q, k, v, c), compiled)
        assert_equals_one_device(function, mesh, [Shard(2), Shard(1)], causal=causal)


@spmd(axes={"cp": 2, "tp": 2})
def test_bare_attention_takes_the_sequence_on_whichever_axis_holds_it(mesh):
    """It communicates over the axis that the placements name, so none is the wrong one."""
    install_sdpa_rules()
    for placements in ([Shard(1), Shard(2)], [Shard(0), Shard(2)], [Shard(2), Replicate()]):
        assert_equals_one_device(attend, mesh, placements)


@spmd(ranks=2)
def test_attention_on_sharded_batch_or_heads_stays_local(mesh):
    install_sdpa_rules()
    for placement in (Shard(0), Shard(1), Replicate()):
        with count_traffic() as traffic:
            assert_equals_one_device(attend, mesh, [placement])
        assert traffic.calls == 0


@spmd(ranks=2)
def test_rules_change_nothing_for_plain_tensors(mesh):
    *inputs, _ = whole_inputs()
    before = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    install_sdpa_rules()
    install_sdpa_rules()
    with count_traffic() as traffic:
        after = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    assert_close(after, before, rtol=0, atol=0)
    assert traffic.calls == 0


@pytest.mark.parametrize("shapes", [{"kv_heads": 1}, {"kv_heads": 8}, {"batch": 1}], ids=repr)
@spmd(ranks=2)
def test_bare_attention_of_other_shapes_is_over_the_whole(mesh, shapes):
    install_sdpa_rules()
    assert_equals_one_device(attend, mesh, [Shard(2)], **shapes)


@spmd(ranks=2)
def test_bare_attention_that_no_fused_kernel_takes_is_exact_or_raises(mesh):
    """Torch takes another value dim apart into plain maths before any rule is asked."""
    install_sdpa_rules()
    expected, _ = on_one_device(False, value_dim=4)
    q, k, v, _ = sharded(whole_inputs(value_dim=4), mesh, [Shard(2)])
    assert_close(attend(q, k, v, causal=False).full_tensor(), expected)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        attend(q, k, v)


@spmd(ranks=2)
def test_gradient_placed_otherwise_is_brought_into_place(mesh):
    install_sdpa_rules()
    _, expected = on_one_device(True)
    *inputs, grad = whole_inputs()
    inputs = [x.requires_grad_() for x in sharded(inputs, mesh, [Shard(2)])]
    out = attend(*inputs)
    grads = torch.autograd.grad(out.redistribute(mesh, [Replicate()]).to_local(), inputs, grad)
    for actual, right in zip(grads, expected, strict=True):
        assert_close(actual.full_tensor(), right)


@pytest.mark.slow_where(lambda style, compiled, ranks: style and compiled and ranks == 4)
@compiled_or_not
@pytest.mark.parametrize("style", [None, AllGatherAttention(), UlyssesAttention()])
@spmd(ranks=(2, 4))
def test_attention_inside_a_layout_is_over_the_whole(mesh, style, compiled, ranks):
    """Backward runs outside of the context. Compiled, one layout is causal, on as many ranks."""
    for kind, causal in product((Contiguous, HeadTail), (True, False)):
        if compiled and causal != ((kind is HeadTail) == (ranks == 2)):
            continue
        torch._dynamo.reset()
        layout = kind(SEQ_LEN, ranks)
        function = maybe_compiled(lambda q, k, v, c=causal: attend(q, k, v, c), compiled)

        def inside(q, k, v):
            with sequence_layout(layout, mesh, style=style):  # noqa: B023
                return function(q, k, v)  # noqa: B023

        order = layout.permutation()
        assert_equals_one_device(inside, mesh, [Shard(2)], causal=causal, order=order)


@spmd(ranks=2)
def test_a_gradient_that_comes_whole_is_cut_as_the_output_was(mesh):
    """As that of a sum over all tokens comes."""
    _, expected = on_one_device(causal=True)
    for style in (RingAttention(), UlyssesAttention(), HybridAttention()):
        inputs = [x.requires_grad_() for x in sharded(whole_inputs()[:3], mesh, [Shard(2)])]
        with sequence_layout(Contiguous(SEQ_LEN, 2), mesh, style=style):
            out = attend(*inputs)
        (grad,) = sharded(whole_inputs()[3:], mesh, [Replicate()])
        for actual, right in zip(torch.autograd.grad(out, inputs, grad), expected, strict=True):
            assert_close(actual.full_tensor(), right)


@spmd(ranks=4)
def test_attention_inside_a_layout_is_two_tier_with_a_style_that_knows_its_nodes(mesh):
    """Four ranks are two nodes: both ranks of one read all keys of the other, which cross once."""
    layout, (q, k, v, _) = Contiguous(SEQ_LEN, 4), sharded(whole_inputs(), mesh, [Shard(2)])
    crossed = []
    for style in (RingAttention(), RingAttention(ranks_per_node=2)):

        def inside(q, k, v):
            with sequence_layout(layout, mesh, style=style):  # noqa: B023
                return attend(q, k, v, causal=False)

        assert_equals_one_device(inside, mesh, [Shard(2)], causal=False)
        with count_traffic() as traffic:
            inside(q, k, v)
        taken_in = torch.tensor(traffic.crossing(mesh.get_local_rank(), 2)[1])
        dist.all_reduce(taken_in)
        crossed.append(int(taken_in))
    assert crossed[0] == 2 * crossed[1] > 0


@compiled_or_not
@spmd(axes={"cp": 2, "tp": 2})
def test_attention_inside_a_layout_with_heads_on_another_axis(mesh, compiled):
    layout = HeadTail(SEQ_LEN, 2)
    function = maybe_compiled(attend, compiled)

    def inside(q, k, v):
        with sequence_layout(layout, mesh["cp"]):
            return function(q, k, v)

    order = layout.permutation()
    assert_equals_one_device(inside, mesh, [Shard(2), Shard(1)], order=order)


@spmd(ranks=2)
def test_ops_of_attention_called_by_name_inside_a_layout_are_refused(mesh):
    """The op's own rule takes shards for contiguous: head-tail's tokens would mask each other."""
    q, k, v, _ = sharded(whole_inputs(), mesh, [Shard(2)])
    error = pytest.raises(ValueError, match="got _scaled_dot_product_flash_attention_for_cpu")
    with sequence_layout(HeadTail(SEQ_LEN, 2), mesh), error:
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)


@pytest.mark.parametrize("causal", [True, False])
@spmd(ranks=2)
def test_attention_inside_a_layout_heeds_documents(mesh, causal):
    documents = packings.across_borders(SEQ_LEN, 2)
    layout = PerDocument.for_batch(documents, 2)

    def inside(q, k, v):
        with sequence_layout(layout, mesh, documents=documents):
            return attend(q, k, v, causal)

    assert_equals_one_device(
        inside, mesh, [Shard(2)], causal=causal, order=layout.permutation(), documents=documents
    )


@spmd(ranks=2)
def test_compiled_code_heeds_the_layout_it_is_called_in(mesh):
    """One compiled function: bare, inside one layout, another, with documents, and bare again."""
    install_sdpa_rules()
    function = torch.compile(attend, backend="aot_eager", fullgraph=True)
    documents = packings.across_borders(SEQ_LEN, 2)
    contexts = [
        None,
        (HeadTail(SEQ_LEN, 2), None),
        (Contiguous(SEQ_LEN, 2), None),
        (HeadTail(SEQ_LEN, 2), documents),
        (PerDocument.for_batch(documents, 2), documents),
        (HeadTail(SEQ_LEN, 2), None),
        None,
    ]
    for context in contexts:
        if context is None:
            assert_equals_one_device(function, mesh, [Shard(2)])
            continue
        layout, packed = context

        def inside(q, k, v):
            with sequence_layout(layout, mesh, documents=packed):  # noqa: B023
                return function(q, k, v)

        order = layout.permutation()
        assert_equals_one_device(inside, mesh, [Shard(2)], order=order, documents=packed)


@pytest.mark.parametrize("written", range(3))
@spmd(ranks=2)
def test_writing_to_a_local_shard_that_backward_reads_is_refused(mesh, written):
    """torch sees such a write to a tensor, and not to what a DTensor was made from.

    What `attend` gives to the op is negated anew, so it is called here by torch's name.
    """
    layout = HeadTail(SEQ_LEN, 2)
    own = layout.token_indices(mesh.get_local_rank())
    shards = [x[:, :, own].requires_grad_() * 1 for x in whole_inputs()[:3]]
    with local_shards(layout, mesh):
        out = captured(*shards, is_causal=True, enable_gqa=True)
    with torch.no_grad():
        shards[written].mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@spmd(ranks=2)
def test_layout_context_leaves_nothing_behind(mesh):
    """Not even when the code inside it fails."""
    before = F.scaled_dot_product_attention
    with pytest.raises(KeyError), sequence_layout(HeadTail(SEQ_LEN, 2), mesh):
        raise KeyError
    assert F.scaled_dot_product_attention is before
    install_sdpa_rules()
    assert_equals_one_device(attend, mesh, [Shard(2)])


@pytest.mark.parametrize("layout", [None, HeadTail(SEQ_LEN, 2)])
@spmd(ranks=2)
def test_what_no_rule_honours_is_refused(mesh, layout):
    """Bare and inside a layout alike."""
    install_sdpa_rules()
    q, k, v, _ = sharded(whole_inputs(kv_heads=8), mesh, [Shard(2)])
    replicated = q.redistribute(mesh, [Replicate()])
    half = sharded([x[:, :, ::2] for x in whole_inputs(kv_heads=8)], mesh, [Shard(2)], slice(None))

    def call(*inputs, **options):
        if layout is None:
            return F.scaled_dot_product_attention(*inputs, **options)
        with sequence_layout(layout, mesh):
            return F.scaled_dot_product_attention(*inputs, **options)

    table = torch.zeros(SEQ_LEN, SEQ_LEN, dtype=torch.float64)
    table = distribute_tensor(table, mesh, [Replicate()])
    refused("takes no mask as a tensor", lambda: call(q, k, v, attn_mask=table))
    refused("sharded alike", lambda: call(q, replicated, replicated))
    refused("sharded alike", lambda: call(q, k, v.redistribute(mesh, [Shard(1)])))
    refused("self-attention, got 32 queries and 16 keys", lambda: call(q, half[1], half[2]))
    if layout is not None:
        refused("has no dropout", lambda: call(q, k, v, dropout_p=0.1))
        refused("as long as the layout, got seq_len=16", lambda: call(*half[:3]))


@spmd(ranks=2)
def test_dropout_is_refused_or_dropout_over_the_whole_sequence(mesh):
    """Torch takes it apart before any rule is asked: with values that show the weights, each
    is either dropped or scaled up."""
    install_sdpa_rules()
    q, k, *_ = whole_inputs(kv_heads=8)
    eye = torch.eye(SEQ_LEN, dtype=torch.float64).expand(2, 8, -1, -1)
    weights = F.scaled_dot_product_attention(q, k, eye)
    q, k, v = sharded((q, k, eye), mesh, [Shard(2)])
    dropped = F.scaled_dot_product_attention(q, k, v, dropout_p=0.25).full_tensor()
    kept = dropped != 0
    assert 0.6 < kept.double().mean() < 0.9
    assert_close(dropped[kept], weights[kept] / 0.75)


@spmd(ranks=2)
def test_queries_alone_unsharded_are_refused(mesh):
    install_sdpa_rules()
    q, k, v, _ = sharded(whole_inputs(kv_heads=8), mesh, [Shard(2)])
    whole = q.redistribute(mesh, [Replicate()])
    refused("sharded alike", lambda: F.scaled_dot_product_attention(whole, k, v))


@spmd(ranks=2)
def test_layout_that_does_not_fit_the_axis_is_refused(mesh):
    refused("got HeadTail.* on 2 ranks", lambda: sequence_layout(HeadTail(SEQ_LEN, 4), mesh))


@spmd(ranks=2)
def test_fewer_kv_heads_inside_a_layout_ask_for_gqa(mesh):
    q, k, v, _ = sharded(whole_inputs(), mesh, [Shard(2)])
    with sequence_layout(HeadTail(SEQ_LEN, 2), mesh):
        refused("enable_gqa=True, got heads=8", lambda: F.scaled_dot_product_attention(q, k, v))


@spmd(axes={"cp": 2, "tp": 2})
def test_sequence_sharded_on_two_axes_is_refused(mesh):
    install_sdpa_rules()
    q, k, v, _ = sharded(whole_inputs(), mesh, [Shard(2), Shard(2)])
    refused(r"on axes of \[2, 2\] ranks", lambda: attend(q, k, v))


@pytest.mark.parametrize("heads", [3, 4])
@spmd(ranks=2)
def test_heads_of_which_ranks_have_unequal_shares_keep_their_number(mesh, heads):
    install_sdpa_rules()
    whole = [torch.randn(2, heads, 8, 4, dtype=torch.float64) for _ in range(4)]
    *inputs, grad = (distribute_tensor(x, mesh, [Shard(1)]) for x in whole)
    inputs = [x.requires_grad_() for x in inputs]
    out = F.scaled_dot_product_attention(*inputs, is_causal=True)
    leaves = [x.requires_grad_() for x in whole[:3]]
    expected = F.scaled_dot_product_attention(*leaves, is_causal=True)
    assert out.shape == expected.shape
    assert_close(out.full_tensor(), expected)
    grads = [x.full_tensor() for x in torch.autograd.grad(out, inputs, grad)]
    assert_close(grads, list(torch.autograd.grad(expected, leaves, whole[3])))
