"""Keys made from values where these arrive, on pieces of any lengths and under HybridAttention."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import ParallelMesh
from dtcp.kernels.rotary import rotate
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from dtcp.sequence.masks import Causal
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention, UlyssesAttention
from dtcp.softmax.mixer import KeysFromValues
from dtcp.softmax.moves import AttentionShape
from tests.harness import reference
from tests.harness.spmd import spmd

SEQ_LEN, HEADS, DIM = 48, 4, 4
PACKED = {
    "rows": Documents(((17, 2, 25), (40,)), SEQ_LEN),
    "equal rows": Documents(((30, 9), (30, 9)), SEQ_LEN),
    "one row": Documents(((3, 39, 4),), SEQ_LEN),
}
RING = HybridAttention(outer=RingAttention())
ALL_GATHER = HybridAttention(outer=AllGatherAttention())


def attend(q, v, scale, frequency, documents):
    """All pairs on one device."""
    k = rotate(v * scale, documents.position_ids().to(torch.int32), frequency)
    q = rotate(q, documents.position_ids().to(torch.int32), frequency)
    visible = reference.visible(documents.lengths, documents.seq_len, reference.causal)
    return reference.attention(q, k, v, visible)[0]


def assert_equals_one_device(mesh, style, layout, documents, kv_heads):
    draw = torch.Generator().manual_seed(0)
    sizes = ((HEADS, DIM), (kv_heads, DIM), (HEADS, DIM))
    rows = documents.batch
    q, v, grad = (
        torch.randn(rows, SEQ_LEN, *size, generator=draw, dtype=torch.float64) for size in sizes
    )
    scale = torch.rand(DIM, generator=draw, dtype=torch.float64)
    frequency = torch.tensor([1.0, 0.1], dtype=torch.float64)
    grad = grad * (documents.document() >= 0)[..., None, None]
    whole = [x.requires_grad_() for x in (q, v, scale)]
    expected = attend(*whole, frequency, documents)
    gradients = torch.autograd.grad(expected, whole, grad)

    mixer = KeysFromValues(Causal())
    apply_plan(nn.ModuleList([mixer]), mesh, {"0": style})
    batch = {"input_ids": torch.zeros(rows, SEQ_LEN, dtype=torch.int64)}
    batch["position_ids"] = documents.position_ids()
    ranks = ParallelMesh.of_sequence(mesh)
    local, plan = shard_batch(batch, ranks, layout, model=mixer, documents=documents)
    own = [plan.shard(x.detach()).contiguous().requires_grad_() for x in (q, v)]
    own.append(scale.detach().clone().requires_grad_())
    with count_traffic() as there:
        out = mixer(own[0], own[1], local["position_ids"], own[2], frequency, plan.attn_metadata)
    with count_traffic() as back:
        grads = torch.autograd.grad(out, own, plan.shard(grad))
    assert_close(out, plan.shard(expected))
    for found, right in zip(grads[:2], gradients[:2], strict=True):
        assert_close(found, plan.shard(right))
    torch.distributed.all_reduce(grads[2], group=mesh.get_group())
    assert_close(grads[2], gradients[2])
    shape = AttentionShape(rows, HEADS, kv_heads, DIM, DIM, 8)
    moves = style.moves(mixer, plan.coords, plan.layout, mesh.get_local_rank(), shape)
    for moved, stated in zip((there, back), (moves.forward, moves.backward), strict=True):
        assert (moved.sent, moved.received) == (sum(stated.sent), sum(stated.received))


@spmd(ranks=4)
def test_values_alone_cross_between_groups_of_hybrid_attention_on_balanced_documents(mesh):
    assert_equals_one_device(mesh, RING, DocumentBalanced, PACKED["rows"], 2)
    assert_equals_one_device(mesh, ALL_GATHER, DocumentBalanced, PACKED["one row"], 1)
    assert_equals_one_device(mesh, RING, HeadTail, PACKED["rows"], 4)


@pytest.mark.slow
@spmd(ranks=(2, 4))
def test_values_alone_cross_in_every_strategy_on_balanced_documents(mesh, ranks):
    for documents in PACKED.values():
        for style in (RING, ALL_GATHER, RingAttention(), AllGatherAttention()):
            for layout in (DocumentBalanced, HeadTail):
                assert_equals_one_device(mesh, style, layout, documents, 2)


@spmd(ranks=2)
def test_strategies_that_bring_no_values_alone_refuse_them(mesh):
    mixer = nn.ModuleList([KeysFromValues(Causal())])
    with pytest.raises(ValueError, match=r"HybridAttention too.*got UlyssesAttention"):
        apply_plan(mixer, mesh, {"0": UlyssesAttention()})


@spmd(ranks=2)
def test_frequencies_that_would_get_part_of_a_gradient_are_refused(mesh):
    """Queries are rotated in the graph, keys where they arrive."""
    documents = Documents.single(1, 8)
    mixer = KeysFromValues(Causal())
    apply_plan(nn.ModuleList([mixer]), mesh, {"0": RingAttention()})
    batch = {"input_ids": torch.zeros(1, 8, dtype=torch.int64)}
    ranks = ParallelMesh.of_sequence(mesh)
    sharded = shard_batch(batch, ranks, HeadTail, model=mixer, documents=documents)[1]
    q, positions = torch.randn(1, 4, 1, DIM), sharded.shard(documents.position_ids())
    frequency = torch.rand(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"frequency.requires_grad=True.*pass frequency.detach"):
        mixer(q, q, positions, torch.ones(DIM), frequency, sharded.attn_metadata)
    with torch.no_grad():
        mixer(q, q, positions, torch.ones(DIM), frequency, sharded.attn_metadata)


@spmd(ranks=2)
def test_a_scale_wider_than_its_values_makes_keys_of_the_values_dtype(mesh):
    """On shards and on one device, against fp64."""
    documents = Documents(((3, 5),), 8)
    q, v, grad = (torch.randn(1, 8, 2, DIM) for _ in range(3))
    scale, frequency = torch.rand(DIM, dtype=torch.float64), torch.tensor([1.0, 0.1])
    wide = [x.double().requires_grad_() for x in (q, v, scale)]
    expected = attend(*wide, frequency, documents)
    wanted = torch.autograd.grad(expected, wide, grad.double())

    mixer = KeysFromValues(Causal())
    one_device = batch_metadata(mixer, documents)
    whole = [x.requires_grad_() for x in (q, v, scale)]
    out = mixer(q, v, documents.position_ids(), scale, frequency, one_device)
    assert_close(out, expected.float())
    grads = torch.autograd.grad(out, whole, grad)
    assert grads[2].dtype == torch.float64
    assert_close([x.float() for x in grads], [x.float() for x in wanted])

    apply_plan(nn.ModuleList([mixer]), mesh, {"0": RingAttention()})
    batch = {"input_ids": torch.zeros(1, 8, dtype=torch.int64)}
    batch["position_ids"] = documents.position_ids()
    ranks = ParallelMesh.of_sequence(mesh)
    local, sharded = shard_batch(batch, ranks, HeadTail, model=mixer, documents=documents)
    own = [sharded.shard(x) for x in (q, v)]
    out = mixer(*own, local["position_ids"], scale, frequency, sharded.attn_metadata)
    assert_close(out, sharded.shard(expected.float()))
    grads = list(torch.autograd.grad(out, [*own, scale], sharded.shard(grad)))
    torch.distributed.all_reduce(grads[2], group=mesh.get_group())
    assert grads[2].dtype == torch.float64
    right = [*(sharded.shard(x) for x in wanted[:2]), wanted[2]]
    assert_close([x.float() for x in grads], [x.float() for x in right])


def test_channels_that_make_no_pairs_are_refused():
    mixer, x = KeysFromValues(Causal()), torch.randn(1, 8, 1, 5)
    operands = (x, x, torch.arange(8)[None], torch.ones(5), torch.rand(2))
    with pytest.raises(ValueError, match=r"in pairs, got v.shape=\(1, 8, 1, 5\)"):
        mixer(*operands, batch_metadata(mixer, Documents.single(1, 8)))
