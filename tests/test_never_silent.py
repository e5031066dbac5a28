"""Every way in which torch's own context parallelism goes wrong without a word (2.11 to 2.15).

A compiled layer attends to its own shard only (rank-local), or half of a step does. Here each
is exact, or refused. Exact means: equal to one device in fp64, and unlike attention to the shard
alone. What users of other libraries met is in test_never_silent_peers.py.
"""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.functional import scaled_dot_product_attention as captured
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointError, checkpoint

from dtcp.compile import EagerIsland, InGraph, count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.sdpa.aten_rules import install_sdpa_rules
from dtcp.sdpa.sequence_layout import sequence_layout
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.softmax import RingAttention
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness.attention_parity import (
    LAYOUTS,
    WINDOW,
    Block,
    Case,
    assert_equals_one_device,
    in_tiles,
    local_inputs,
    mixer_on,
    shard_case,
    styles,
    truth,
)
from tests.harness.spmd import spmd

SEQ_LEN, HEADS, DIM = 32, 4, 8
boundaries = pytest.mark.parametrize("boundary", [InGraph(), EagerIsland()])


class SDPALayer(nn.Module):
    """A layer that kept torch's function under a name of its own, before anyone could patch it."""

    def forward(self, q, k, v):
        return -captured(-q, -k, -v, is_causal=True)


def whole_qkv():
    generator = torch.Generator().manual_seed(0)
    shape = (2, HEADS, SEQ_LEN, DIM)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]


def on_one_device():
    """(output, gradients) of causal attention over the whole sequence, in its order."""
    *inputs, grad = whole_qkv()
    inputs = [x.requires_grad_() for x in inputs]
    out = captured(*inputs, is_causal=True)
    return out.detach(), torch.autograd.grad(out, inputs, grad)


def sharded_qkv(mesh, layout):
    order = layout.permutation()
    *inputs, grad = (distribute_tensor(x[:, :, order], mesh, [Shard(2)]) for x in whole_qkv())
    return [x.requires_grad_() for x in inputs], grad


def assert_whole(out, grads, layout):
    """Equal to one device, and unlike attention to the shard alone."""
    expected, expected_grads = on_one_device()
    order = layout.permutation()
    assert_close(out.full_tensor().detach(), expected[:, :, order])
    for actual, right in zip(grads, expected_grads, strict=True):
        assert_close(actual.full_tensor(), right[:, :, order])
    q, k, v, _ = (
        x[:, :, layout.token_indices(out.device_mesh.get_local_rank())] for x in whole_qkv()
    )
    # A first contiguous shard sees nothing outside of it; some other rank's must.
    apart = (captured(q, k, v, is_causal=True) - out.to_local()).abs().max().detach()
    dist.all_reduce(apart, op=dist.ReduceOp.MAX)
    assert apart > 0.1


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@spmd(ranks=2)
def test_m1_function_captured_before_the_context(mesh, compiled):
    """torch: F is patched, so a captured function is rank-local, eager and compiled."""
    layer = SDPALayer()
    attend = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    layout = HeadTail(SEQ_LEN, 2)
    inputs, grad = sharded_qkv(mesh, layout)
    with sequence_layout(layout, mesh), count_traffic() as traffic:
        out = attend(*inputs)
        grads = torch.autograd.grad(out, inputs, grad)
    assert_whole(out, grads, layout)
    assert traffic["dtcp::ring_attention"].calls == 1


@boundaries
@spmd(ranks=2)
def test_m2_style_applied_after_the_first_compiled_call(mesh, boundary):
    """torch: hooks attached late are not guarded, so the warmed-up layer stays rank-local."""
    case, style = Case(WINDOW), RingAttention(boundary=boundary)
    model = Block(SoftmaxAttention(WINDOW.mask))
    attend = torch.compile(model, backend="aot_eager")
    one = truth(case, 2)
    q, k, v, sink = one.inputs
    attn_metadata = batch_metadata(model, case.documents(2))
    assert_close(attend(q, k, v, attn_metadata, sink=sink), one.out)

    apply_plan(model, mesh, {"mixer": style})
    with count_traffic() as traffic:
        assert_equals_one_device(case, attend, model, mesh, HeadTail)
    assert traffic["dtcp::ring_attention"].calls == 1
    # And the metadata of one device, which the warm-up used, are of no use to it now.
    with pytest.raises(ValueError, match="reads the metadata of its batch"):
        attend(q, k, v, attn_metadata, sink=sink)


@spmd(ranks=2)
def test_m3_rules_that_were_never_installed(mesh):
    """torch: a forgotten dispatcher leaves attention rank-local. Without our rules it raises."""
    handlers = DTensor._op_dispatcher._custom_op_handlers
    before = dict(handlers)
    layout = Contiguous(SEQ_LEN, 2)
    inputs, grad = sharded_qkv(mesh, layout)
    for op in [op for op in handlers if "scaled_dot_product" in str(op)]:
        del handlers[op]
    try:
        with pytest.raises(NotImplementedError, match="sharding strategy"):
            SDPALayer()(*inputs)
    finally:
        handlers.update(before)
    install_sdpa_rules()
    out = SDPALayer()(*inputs)
    assert_whole(out, torch.autograd.grad(out, inputs, grad), layout)


@spmd(ranks=2)
def test_m3_style_needs_no_rule_that_a_person_could_forget(mesh):
    """A style brings its own."""
    handlers = DTensor._op_dispatcher._custom_op_handlers
    for op in [op for op in handlers if "dtcp" in str(op)]:
        del handlers[op]
    for style in styles(2):
        mixer = mixer_on(mesh, style, WINDOW.mask)
        assert_equals_one_device(Case(WINDOW), mixer, mixer, mesh, HeadTail)


@spmd(ranks=2)
def test_m4_layer_traced_before_the_rules(mesh):
    """torch: the handler table is not guarded, so a layer traced without it is rank-local for
    good. Ours meets the layout as a guarded part of the call."""
    install_sdpa_rules()
    layer = torch.compile(SDPALayer(), backend="aot_eager", fullgraph=True)
    layout = Contiguous(SEQ_LEN, 2)
    inputs, grad = sharded_qkv(mesh, layout)
    plain = [x.detach() for x in whole_qkv()[:3]]
    assert_close(layer(*plain), on_one_device()[0])
    for _ in range(2):
        out = layer(*inputs)
        assert_whole(out, torch.autograd.grad(out, inputs, grad), layout)
        with sequence_layout(layout, mesh):
            out = layer(*inputs)
        assert_whole(out, torch.autograd.grad(out, inputs, grad), layout)


@spmd(ranks=2)
def test_m5_layout_that_changes_after_the_trace(mesh):
    """torch: another balance setting after the trace gives neither the whole nor the shard."""
    layer = torch.compile(SDPALayer(), backend="aot_eager", fullgraph=True)
    for layout in (HeadTail(SEQ_LEN, 2), Contiguous(SEQ_LEN, 2), HeadTail(SEQ_LEN, 2)):
        inputs, grad = sharded_qkv(mesh, layout)
        with sequence_layout(layout, mesh):
            out = layer(*inputs)
        assert_whole(out, torch.autograd.grad(out, inputs, grad), layout)


@boundaries
@spmd(ranks=2)
def test_m5_batches_of_other_layouts_and_lengths_after_the_trace(mesh, boundary):
    mixer = mixer_on(mesh, in_tiles(RingAttention(boundary=boundary), 5), WINDOW.mask)
    attend = torch.compile(Block(mixer), backend="aot_eager")
    batches = [(layout, 48) for layout in LAYOUTS] + [(HeadTail, 32), (Contiguous, 64)]
    for layout, seq_len in batches:
        assert_equals_one_device(Case(WINDOW, seq_len=seq_len), attend, mixer, mesh, layout)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@spmd(ranks=2)
def test_m6_backward_outside_the_context(mesh, compiled):
    """torch: output exact, gradients silently wrong."""
    layer = SDPALayer()
    attend = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    layout = HeadTail(SEQ_LEN, 2)
    inputs, grad = sharded_qkv(mesh, layout)
    with sequence_layout(layout, mesh):
        out = attend(*inputs)
    with count_traffic() as traffic:
        grads = torch.autograd.grad(out, inputs, grad)
    assert_whole(out, grads, layout)
    assert traffic["dtcp::ring_attention_backward"].calls == 1


@spmd(ranks=2)
def test_m7_recomputation_outside_the_context(mesh):
    """torch: the recomputed layer is rank-local, and checkpoint notices only if shapes differ.

    A context does not reach into the recomputation, so this one is refused by checkpoint, since
    another op ran; a style is part of the module, so it is exact.
    """
    install_sdpa_rules()
    layout = HeadTail(SEQ_LEN, 2)
    inputs, grad = sharded_qkv(mesh, layout)
    for layer in (SDPALayer(), torch.compile(SDPALayer(), backend="aot_eager")):
        with sequence_layout(layout, mesh):
            out = checkpoint(layer, *inputs, use_reentrant=False)
        with pytest.raises(CheckpointError):
            torch.autograd.grad(out, inputs, grad)
        dist.barrier()

    for style in styles(2):
        mixer = mixer_on(mesh, style, WINDOW.mask)

        def attend(*args, **kwargs):
            return checkpoint(mixer, *args, use_reentrant=False, **kwargs)  # noqa: B023

        with count_traffic() as traffic:
            assert_equals_one_device(Case(WINDOW), attend, mixer, mesh, HeadTail)
        assert traffic[f"dtcp::{style.op.name}"].calls == 2


@boundaries
@spmd(ranks=2)
def test_m8_liveness_is_counted_where_no_mode_can_hide_it(mesh, boundary):
    """torch: under a dispatch mode dynamo runs eager, so a dead collective passes its test.

    Our proof is the op's own count, with graphs made; under a mode the result is the same.
    """
    case = Case(WINDOW, sink=False)
    mixer = mixer_on(mesh, RingAttention(boundary=boundary), WINDOW.mask)
    attend = torch.compile(Block(mixer), backend="aot_eager")
    sharded = shard_case(case, mixer, mesh, Contiguous)
    grad_out = sharded.shard(truth(case, 2).grad_out)

    def step():
        q, k, v = local_inputs(case, sharded)
        out = attend(q, k, v, sharded.attn_metadata)
        out.backward(grad_out)
        return out.detach(), q.grad, k.grad, v.grad

    with count_graphs() as graphs, count_traffic() as traffic:
        result = step()
    assert graphs.graphs >= 1
    assert traffic["dtcp::ring_attention"].calls == 1 and traffic.received > 0
    for actual, whole in zip(result, (truth(case, 2).out, *truth(case, 2).grads), strict=True):
        assert_close(actual, sharded.shard(whole))
    with CommDebugMode(), count_traffic() as watched:
        assert_close(step(), result)
    assert watched.by_op == traffic.by_op
