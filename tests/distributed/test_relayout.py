"""Shard, gather, relayout and roll: against indexing of the whole sequence."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from dtcp.distributed.groups import group_name
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.relayout import (
    RelayoutMetadata,
    apply_relayout,
    gather,
    relayout,
    roll,
    shard,
)
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from tests.harness.collective_reference import (
    BOUNDARIES,
    assert_equals_one_process,
    compiled_or_not,
)
from tests.harness.spmd import spmd

FP64 = 8
DOCUMENTS = Documents(((5, 10, 3),), 24)
KINDS = [Contiguous, HeadTail, PerDocument, BlockBalanced]
boundaries = pytest.mark.parametrize("compiled", BOUNDARIES, ids=["eager", "compiled"])


def whole_of(xs, layout, dim):
    return layout.restore(torch.cat(xs, dim=dim), dim=dim)


def shards_of(whole, layout, dim):
    return [layout.shard(whole, rank, dim=dim) for rank in range(layout.num_shards)]


def shape_of(layout, dim):
    return [layout.shard_len if index == dim % 3 else index + 2 for index in range(3)]


@spmd(ranks=(1, 2, 3, 4))
def test_gather_returns_the_whole_in_position_order(mesh, ranks):
    for kind in KINDS:
        for dim in (0, 1, -1):
            check_gather(mesh, kind.for_batch(DOCUMENTS, ranks), dim, ranks)


def check_gather(mesh, layout, dim, ranks):
    shape = shape_of(layout, dim)
    forward, backward = assert_equals_one_process(
        mesh,
        lambda x: gather(x, layout, mesh, dim=dim),
        lambda xs: [whole_of(xs, layout, dim)] * ranks,
        [shape] * ranks,
    )
    expected = (ranks - 1) * torch.Size(shape).numel() * FP64
    assert (forward.received, backward.received) == (expected, expected)


@boundaries
@spmd(ranks=(1, 2, 4))
def test_shard_keeps_the_tokens_and_its_backward_gathers_every_gradient(mesh, compiled, ranks):
    for kind in KINDS[ranks // 4 : ranks // 4 + 1] if compiled else KINDS:
        check_shard(mesh, kind.for_batch(DOCUMENTS, ranks), compiled, ranks)


def check_shard(mesh, layout, compiled, ranks):
    rank = mesh.get_local_rank()
    x = torch.randn(2, 24, 3, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)
    with count_traffic() as forward:
        out = compiled_or_not(lambda x: shard(x, layout, mesh), compiled)(x)
    with count_traffic() as backward:
        (grad,) = torch.autograd.grad(out, x, layout.shard(cotangent, rank))
    assert_close(out, layout.shard(x, rank))
    assert_close(grad, cotangent)
    assert forward.received == 0
    assert backward.received == (ranks - 1) * 2 * layout.shard_len * 3 * FP64


@boundaries
@spmd(ranks=(1, 2, 4))
def test_gather_of_shard_is_the_whole(mesh, compiled, ranks):
    layout = HeadTail(24, ranks)
    x = torch.randn(2, 24)
    out = compiled_or_not(lambda x: gather(shard(x, layout, mesh), layout, mesh), compiled)(x)
    assert_close(out, x, rtol=0, atol=0)


def ways(mesh, source, target, dim):
    """By layouts; and by metadata, made for the way there or for the way back."""
    yield lambda x: relayout(x, source, target, mesh, dim=dim)
    if dim == 1:
        rank, group = mesh.get_local_rank(), group_name(mesh)
        there, back = (
            RelayoutMetadata.between(source, target, rank),
            RelayoutMetadata.between(target, source, rank),
        )
        yield lambda x: apply_relayout(x, there, group)
        yield lambda x: apply_relayout(x, back, group, reverse=True)


def check_relayout(mesh, source, target, dim, *, compiled=None):
    """In every way, or compiled: in the way of that number."""
    ranks, rank = source.num_shards, mesh.get_local_rank()
    shape = shape_of(source, dim)
    held, wanted = (set(layout.token_indices(rank).tolist()) for layout in (source, target))
    moved = len(wanted - held) * torch.Size(shape).numel() // source.shard_len * FP64
    all_ways = list(ways(mesh, source, target, dim))
    for way in all_ways if compiled is None else [all_ways[compiled]]:
        forward, backward = assert_equals_one_process(
            mesh,
            way,
            lambda xs: shards_of(whole_of(xs, source, dim), target, dim),
            [shape] * ranks,
            compiled=compiled is not None,
        )
        assert (forward.calls, backward.calls) == (1, 1)
        assert forward.received == forward.sent == backward.received == backward.sent == moved


@spmd(ranks=(1, 2, 3, 4))
def test_relayout_receives_only_tokens_that_change_owner(mesh, ranks):
    layouts = [kind.for_batch(DOCUMENTS, ranks) for kind in KINDS]
    for index, (source, target) in enumerate(product(layouts, layouts)):
        for dim in (1, (0, -1)[index % 2]):
            check_relayout(mesh, source, target, dim)


@spmd(ranks=(2, 4))
def test_relayout_in_a_graph_does_the_same(mesh, ranks):
    """Each way between other layouts, on two ranks than on four."""
    pairs = [(Contiguous, HeadTail), (HeadTail, Contiguous), (Contiguous, BlockBalanced)]
    for index, pair in enumerate(pairs):
        layouts = (kind.for_batch(DOCUMENTS, ranks) for kind in pair)
        check_relayout(mesh, *layouts, 1, compiled=(index + ranks) % 3)


def check_roll(mesh, layout, shift, *, compiled):
    def reference(xs):
        return shards_of(whole_of(xs, layout, 1).roll(shift, dims=1), layout, 1)

    return assert_equals_one_process(
        mesh,
        lambda x: roll(x, layout, mesh, shift=shift),
        reference,
        [(2, layout.shard_len, 3)] * layout.num_shards,
        compiled=compiled,
    )


@spmd(ranks=(1, 2, 3, 4))
def test_roll_moves_tokens_along_the_whole_sequence(mesh, ranks):
    for kind in KINDS:
        for shift in (-1, 1, -9, 24, 50):
            check_roll(mesh, kind.for_batch(DOCUMENTS, ranks), shift, compiled=False)


@spmd(ranks=(2, 4))
def test_roll_in_a_graph_does_the_same(mesh, ranks):
    kind = Contiguous if ranks == 2 else HeadTail
    check_roll(mesh, kind(24, ranks), -1, compiled=True)


@spmd(ranks=4)
def test_roll_by_one_moves_one_token_a_segment(mesh):
    forward, backward = check_roll(mesh, Contiguous(24, 4), -1, compiled=False)
    assert forward.received == forward.sent == backward.received == 6 * FP64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
@spmd(ranks=2)
def test_tokens_arrive_bit_for_bit(mesh, dtype):
    source, target = Contiguous(24, 2), HeadTail(24, 2)
    whole = torch.randn(2, 24, 3).mul(100).to(dtype)
    rank = mesh.get_local_rank()
    with count_traffic() as moved:
        out = relayout(source.shard(whole, rank), source, target, mesh)
    assert_close(out, target.shard(whole, rank), rtol=0, atol=0)
    assert moved.received == 2 * 6 * 3 * dtype.itemsize


@spmd(ranks=2)
def test_misuse_is_refused(mesh):
    x = torch.ones(1, 4)
    with pytest.raises(ValueError, match="num_shards=4 on a mesh of 2 ranks"):
        shard(x, Contiguous(4, 4), mesh)
    with pytest.raises(TypeError, match=r"sharded by a layout, got layout=.*an instance"):
        shard(x, Contiguous, mesh)
    with pytest.raises(TypeError, match=r"from one layout to another, got .*of type .*an instance"):
        relayout(x, Contiguous(8, 2), HeadTail, mesh)
    with pytest.raises(ValueError, match=r"shard of 8 tokens .* x.shape=\(1, 4\), dim=1"):
        gather(x, Contiguous(16, 2), mesh)
    with pytest.raises(ValueError, match=r"source=Contiguous.seq_len=8.* one sequence and mesh"):
        relayout(x, Contiguous(8, 2), HeadTail(16, 2), mesh)
    attn_metadata = RelayoutMetadata.between(
        Contiguous(16, 2), HeadTail(16, 2), mesh.get_local_rank()
    )
    with pytest.raises(ValueError, match=r"metadata for 8 tokens with x.shape=\(1, 4\)"):
        apply_relayout(x, attn_metadata, group_name(mesh))
