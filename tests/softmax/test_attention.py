"""Every strategy, on every layout and mask, is attention on one device.

Output and all gradients, with random cotangents; sinks too. Cases are looped over inside a test,
since a compiled mixer then serves several, and a failing case names itself.
"""

from itertools import cycle, product

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from dtcp.batch import shard_batch
from dtcp.compile import ISLAND, EagerIsland, InGraph, count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import ParallelMesh
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention, UlyssesAttention
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness import packings
from tests.harness.attention_parity import (
    BIDIRECTIONAL,
    CAUSAL,
    IMAGES_IN_WINDOW,
    LAYOUTS,
    MASK_CASES,
    PREFIX,
    WINDOW,
    Block,
    Case,
    accepts,
    assert_equals_one_device,
    errors,
    in_tiles,
    local_inputs,
    mixer_on,
    run,
    shard_case,
    styles,
    truth,
)
from tests.harness.spmd import spmd

TILE = 5  # does not divide the shards
PACKINGS = (
    packings.across_borders,
    packings.one_token_documents,
    packings.last_shard_padding,
    packings.two_rows,
    packings.equal_rows,
)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def heads_for(num_ranks):
    """Query heads that ranks divide, with kv heads that they divide or that divide them."""
    return {"heads": 6, "kv_heads": 3} if num_ranks == 3 else {"heads": 4, "kv_heads": 2}


def compiled(mixer, boundary):
    """The mixer in a block compiled as its boundary demands."""
    whole = isinstance(boundary, InGraph)
    return torch.compile(Block(mixer), backend="aot_eager", fullgraph=whole)


@layouts
@spmd(ranks=2)
def test_attention_equals_one_device(mesh, layout):
    """Documents cut by every border, of one token, rows of padding, rows packed differently.

    Under every mask, in balanced layouts too: accelerate 4177 trained windows as full attention,
    and pytorch 141429 crashed on non-causal attention in the default layout.
    """
    assert_masks_differ(2)
    for index, style, mask_case in each_style_and_mask(2, MASK_CASES):
        mixer = mixer_on(mesh, in_tiles(style, TILE), mask_case.mask)
        first = index + LAYOUTS.index(layout)
        for packing in (PACKINGS[first % 5], PACKINGS[(first + 2) % 5]):
            case = Case(mask_case, packing)
            if accepts(style, layout, case, 2):
                assert_equals_one_device(case, mixer, mixer, mesh, layout)


@pytest.mark.slow_where(lambda layout: layout is not HeadTail)
@layouts
@spmd(ranks=4)
def test_attention_on_four_ranks_equals_one_device(mesh, layout):
    assert_masks_differ(4)
    for index, style, mask_case in each_style_and_mask(4, MASK_CASES):
        mixer = mixer_on(mesh, in_tiles(style, TILE), mask_case.mask)
        case = Case(mask_case, PACKINGS[(index + LAYOUTS.index(layout)) % 5])
        if accepts(style, layout, case, 4):
            assert_equals_one_device(case, mixer, mixer, mesh, layout)


def each_style_and_mask(ranks, mask_cases):
    """(index, style, mask): counted on from style to style and from mask to mask, so that what is
    chosen by it, such as a packing, meets every style and every mask."""
    for (i, style), (j, mask_case) in product(enumerate(styles(ranks)), enumerate(mask_cases)):
        yield i + j, style, mask_case


def assert_masks_differ(ranks):
    """By more than rounding: a test that cannot see that a mask was dropped proves nothing."""
    causal = truth(Case(CAUSAL, **heads_for(ranks)), ranks).out
    for mask_case in MASK_CASES:
        difference = truth(Case(mask_case, **heads_for(ranks)), ranks).out - causal
        assert (difference.abs().max() > 0.01) == (mask_case is not CAUSAL)


@layouts
@spmd(ranks=(1, 3))
def test_attention_on_odd_ranks_equals_one_device(mesh, layout, ranks):
    for index, style, mask_case in each_style_and_mask(ranks, (BIDIRECTIONAL, IMAGES_IN_WINDOW)):
        packing = (packings.across_borders, packings.equal_rows)[index % 2]
        case = Case(mask_case, packing, **heads_for(ranks))
        if accepts(style, layout, case, ranks):
            mixer = mixer_on(mesh, in_tiles(style, TILE), mask_case.mask)
            assert_equals_one_device(case, mixer, mixer, mesh, layout)


@pytest.mark.slow_where(lambda boundary, ranks: ranks != 2)
@pytest.mark.parametrize("boundary", [InGraph(), EagerIsland()])
@spmd(ranks=(1, 2, 3, 4))
def test_compiled_attention_equals_one_device(mesh, boundary, ranks):
    """One compiled block a style, for batches and layouts, other ones than of the style before
    it; it moves what eager code moves, in the same ops."""
    for index, style in enumerate(styles(ranks, boundary=boundary)):
        torch._dynamo.reset()
        cases = [(HeadTail, packings.equal_rows), (HeadTail, packings.two_rows)]
        if ranks == 2:
            first, second = LAYOUTS[index % 4], LAYOUTS[(index + 1) % 4]
            cases = [(first, packings.equal_rows), (first, packings.two_rows)]
            cases += [(second, packings.two_rows)] * isinstance(boundary, InGraph)
        mixer = mixer_on(mesh, in_tiles(style, TILE), IMAGES_IN_WINDOW.mask)
        attend = compiled(mixer, boundary)
        with count_graphs() as graphs:
            for layout, packing in cases:
                # 64 tokens suit all layouts as they are, 48 suit 3 ranks.
                seq_len = 48 if ranks == 3 else 64
                case = Case(IMAGES_IN_WINDOW, packing, seq_len=seq_len, **heads_for(ranks))
                if accepts(style, layout, case, ranks):
                    assert_compiled_equals_one_device(case, attend, mixer, mesh, layout)
        assert graphs.graphs >= 1


def assert_compiled_equals_one_device(case, attend, mixer, mesh, layout):
    with count_traffic() as compiled_traffic:
        assert_equals_one_device(case, attend, mixer, mesh, layout)
    sharded = shard_case(case, mixer, mesh, layout)
    with count_traffic() as traffic:
        run(case, mixer, sharded, local_inputs(case, sharded))
    assert compiled_traffic == traffic
    calls = {op: counted.calls for op, counted in traffic.by_op.items() if op != ISLAND}
    assert calls == {f"dtcp::{mixer.style.op.name}{end}": 1 for end in ("", "_backward")}


@spmd(ranks=2)
def test_compiled_attention_equals_one_device_under_every_mask(mesh):
    """In graphs and around islands by turns: a mask is data to both."""
    for boundary, mask_case in zip(cycle((InGraph(), EagerIsland())), MASK_CASES, strict=False):
        torch._dynamo.reset()
        mixer = mixer_on(mesh, in_tiles(RingAttention(boundary=boundary), TILE), mask_case.mask)
        attend = compiled(mixer, boundary)
        case = Case(mask_case, packings.one_token_documents)
        assert_equals_one_device(case, attend, mixer, mesh, HeadTail)


@spmd(ranks=(2, 4))
def test_island_in_eager_code_is_the_same(mesh, ranks):
    for style in styles(ranks, boundary=EagerIsland()):
        mixer = mixer_on(mesh, style, WINDOW.mask)
        assert_equals_one_device(Case(WINDOW), mixer, mixer, mesh, Contiguous)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"scale": 0.7, "sink": False},
        {"value_dim": 3},
        {"key_dim": 3, "value_dim": 5, "softcap": 4.0},
        {"heads": 8, "kv_heads": 1},
        {"heads": 4, "kv_heads": 4},
        {"heads": 8, "kv_heads": 8},
    ],
    ids=repr,
)
@spmd(ranks=(2, 4))
def test_attention_of_other_shapes_equals_one_device(mesh, options, ranks):
    for index, style in enumerate(styles(ranks)):
        layout = (HeadTail, PerDocument)[(index + ranks // 2) % 2]
        case = Case(IMAGES_IN_WINDOW, packings.across_borders, **options)
        if accepts(style, layout, case, ranks):
            softmax = {"scale": case.scale, "softcap": case.softcap}
            mixer = mixer_on(mesh, in_tiles(style, TILE), case.mask_case.mask, **softmax)
            assert_equals_one_device(case, mixer, mixer, mesh, layout)


@spmd(ranks=(2, 4))
def test_hybrid_of_any_inner_size_equals_one_device(mesh, ranks):
    """From a ring alone to Ulysses alone."""
    for inner in (1, ranks):
        mixer = mixer_on(mesh, in_tiles(HybridAttention(inner_ranks=inner), TILE), WINDOW.mask)
        for layout in (Contiguous, BlockBalanced) if inner == 1 else (HeadTail, PerDocument):
            assert_equals_one_device(Case(WINDOW), mixer, mixer, mesh, layout)


@layouts
@spmd(ranks=(3, 4))
def test_rows_padded_to_fit_the_layout_equal_one_device(mesh, layout, ranks):
    """41 tokens fit none; what was added is gone when the output is gathered."""
    for style in styles(ranks)[(LAYOUTS.index(layout) + ranks) % 2 :: 2]:
        case = Case(WINDOW, packings.equal_rows, seq_len=41, **heads_for(ranks))
        if accepts(style, layout, case, ranks):
            mixer = mixer_on(mesh, in_tiles(style, TILE), WINDOW.mask)
            sharded = shard_case(case, mixer, mesh, layout)
            result = run(case, mixer, sharded, local_inputs(case, sharded))
            assert max(errors(case, result, sharded).values()) <= 1e-12, style
            assert_close(sharded.gather(result.out), truth(case, ranks).out)


@spmd(ranks=(2, 4))
def test_rank_that_holds_only_padding_has_no_part_in_anything(mesh, ranks):
    """Its output and gradients are zero, and the other ranks' are exact; in Ulysses it still
    attends for others, with its share of the heads, so that its part of dsink is not zero."""
    for style in styles(ranks):
        case = Case(WINDOW, packings.last_shard_padding)
        mixer = mixer_on(mesh, style, WINDOW.mask)
        sharded = shard_case(case, mixer, mesh, Contiguous)
        result = run(case, mixer, sharded, local_inputs(case, sharded))
        assert max(errors(case, result, sharded).values()) <= 1e-12
        if mesh.get_local_rank() == ranks - 1:
            assert (sharded.shard(sharded.documents.document()) < 0).all()
            assert not any(x.any() for x in (result.out, *result.grads[:3]))


@spmd(ranks=(2, 4))
def test_fp32_attention_equals_one_device(mesh, ranks):
    for (i, style), (j, layout) in product(enumerate(styles(ranks)), enumerate(LAYOUTS)):
        if (i + j + ranks // 2) % 2:
            continue  # of the other number of ranks
        case = Case(IMAGES_IN_WINDOW, dtype=torch.float32)
        if accepts(style, layout, case, ranks):
            mixer = mixer_on(mesh, in_tiles(style, TILE), case.mask_case.mask)
            assert_equals_one_device(case, mixer, mixer, mesh, layout)


@spmd(ranks=(2, 4))
def test_bf16_attention_is_as_exact_as_one_device(mesh, ranks):
    """Error against fp64, output and gradients: at most 1.1 of that of torch's own kernel."""
    case = Case(CAUSAL, dtype=torch.bfloat16, sink=False, seq_len=192)
    expected = truth(case, ranks)
    plain = plain_attention(case, ranks)
    for style, layout in product(styles(ranks), (Contiguous, HeadTail)):
        if not accepts(style, layout, case, ranks):
            continue
        mixer = mixer_on(mesh, in_tiles(style, 16), CAUSAL.mask)
        sharded = shard_case(case, mixer, mesh, layout)
        result = run(case, mixer, sharded, local_inputs(case, sharded))
        ours = [sharded.gather(x).double() for x in (result.out, *result.grads)]
        wholes = (expected.out, *expected.grads)
        for mine, torchs, right in zip(ours, plain, wholes, strict=True):
            error, bound = ((x - right).norm() / right.norm() for x in (mine, torchs))
            assert error <= 1.1 * bound, f"{error} > 1.1 * {bound} with {style}, {layout}"


def plain_attention(case, ranks):
    """Output and gradients of torch's attention, in the case's dtype on one device."""
    expected = truth(case, ranks)
    inputs = [x.to(case.dtype).requires_grad_() for x in expected.inputs]
    visible = case.mask_case.visible(case.documents(ranks))[:, None]
    q, k, v = (x.transpose(1, 2) for x in inputs)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    out = out.transpose(1, 2)
    grads = torch.autograd.grad(out, inputs, expected.grad_out)
    return [x.detach().double() for x in (out, *grads)]


@pytest.mark.slow_where(lambda boundary: boundary is not None)
@pytest.mark.parametrize("boundary", [None, InGraph(), EagerIsland()])
@spmd(axes={"cp": 2, "tp": 2})
def test_heads_sharded_over_tp_equal_one_device(mesh, boundary):
    """Each tp rank has half of the heads, and of the sinks, on local tensors."""
    tp, case = mesh["tp"], Case(IMAGES_IN_WINDOW, heads=8, kv_heads=4)
    for style in styles(2, boundary=boundary or InGraph()):
        torch._dynamo.reset()
        mixer = mixer_on(mesh, in_tiles(style, TILE), case.mask_case.mask)
        attend = mixer if boundary is None else compiled(mixer, boundary)
        sharded = shard_case(case, mixer, mesh, Contiguous)
        expected = truth(case, 2)

        def mine(x):
            return x.chunk(2, dim=2 if x.ndim == 4 else 0)[tp.get_local_rank()]

        inputs = tuple(
            mine(x).detach().clone().requires_grad_() for x in local_inputs(case, sharded)
        )
        q, k, v, sink = inputs
        out = attend(q, k, v, sharded.attn_metadata, sink=sink)
        grads = torch.autograd.grad(out, inputs, mine(sharded.shard(expected.grad_out)))
        assert_close(out, mine(sharded.shard(expected.out)))
        for grad, whole in zip(grads[:3], expected.grads[:3], strict=True):
            assert_close(grad, mine(sharded.shard(whole)))
        dsink = grads[3].clone()
        torch.distributed.all_reduce(dsink, group=mesh["cp"].get_group())
        assert_close(dsink, mine(expected.grads[3]))


@spmd(ranks=2)
def test_inputs_need_not_be_contiguous(mesh):
    """Nor the gradient: that of a sum is one number, expanded (NeMo issue 2384)."""
    case = Case(PREFIX, packings.two_rows, sink=False)
    for style in styles(2)[:-1]:
        mixer = mixer_on(mesh, style, PREFIX.mask)
        sharded = shard_case(case, mixer, mesh, HeadTail)
        inputs = local_inputs(case, sharded)
        turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        assert not turned[0].is_contiguous()
        actual = torch.autograd.grad(mixer(*turned, sharded.attn_metadata).sum(), inputs)
        whole = [x.clone().requires_grad_() for x in truth(case, 2).inputs]
        one = SoftmaxAttention(PREFIX.mask)
        assert_close(actual, one_device_gradients(one, case, sharded, whole))


def one_device_gradients(mixer, case, sharded, inputs):
    """This rank's part of the gradients of the output's sum, on one device."""
    documents = case.documents(2)
    attn_metadata = batch_metadata(mixer, documents, prefix=packings.prefix_of_tokens(documents))
    grads = torch.autograd.grad(mixer(*inputs, attn_metadata).sum(), inputs)
    return tuple(sharded.shard(x) for x in grads)


@pytest.mark.parametrize("boundary", [InGraph(), EagerIsland()])
@spmd(ranks=2)
def test_recomputed_attention_equals_one_device(mesh, boundary):
    """Under activation checkpointing, eager and compiled, in the order that apply.py knows."""
    mixer = mixer_on(mesh, RingAttention(boundary=boundary), WINDOW.mask)

    def recomputed(function):
        return lambda *args, **kw: checkpoint(function, *args, use_reentrant=False, **kw)

    block = Block(mixer)
    if isinstance(boundary, InGraph):
        both = torch.compile(recomputed(block), backend="aot_eager", fullgraph=True)
    else:
        both = recomputed(torch.compile(block, backend="aot_eager"))
    for attend in (recomputed(block), both):
        with count_graphs() as graphs:
            assert_equals_one_device(Case(WINDOW), attend, mixer, mesh, HeadTail)
        assert graphs.graphs == 0 or attend is both


@spmd(ranks=2)
def test_layers_of_different_kinds_share_a_batch(mesh):
    """A plan with another strategy for each mask, all reading one batch's metadata."""
    masks = (CAUSAL, WINDOW, BIDIRECTIONAL, CAUSAL)
    kinds = (RingAttention(), AllGatherAttention(), UlyssesAttention(), UlyssesAttention())
    mixers = nn.ModuleList(SoftmaxAttention(mask_case.mask) for mask_case in masks)
    apply_plan(mixers, mesh, {f"{index}": kind for index, kind in enumerate(kinds)})
    documents = packings.across_borders(48, 2)
    batch = {"input_ids": torch.zeros(1, 48, dtype=torch.int64)}
    whole = ParallelMesh.from_device_mesh(mesh)
    _, sharded = shard_batch(batch, whole, BlockBalanced, model=mixers, documents=documents)
    for mixer, mask_case in zip(mixers, masks, strict=True):
        case = Case(mask_case)
        result = run(case, mixer, sharded, local_inputs(case, sharded))
        assert max(errors(case, result, sharded).values()) <= 1e-12
