"""What the fuzzer found in calls that ranks make together: row A9, refused alike on all of them."""

import pytest
import torch
from torch.nn import ModuleList

from dtcp.batch import shard_batch
from dtcp.cp_utils import create_context_parallel_ctx, gather_cp_seq, make_cp_batch_and_ctx
from dtcp.distributed import relayout
from dtcp.distributed.collectives import all_gather, all_to_all, halo, reduce_scatter, ring_shift
from dtcp.distributed.mesh import ParallelMesh
from dtcp.mixer_plan import apply_plan
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Causal
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention, UlyssesAttention
from dtcp.softmax.mixer import KeysFromValues, SoftmaxAttention
from tests.harness.attention_parity import refused
from tests.harness.spmd import spmd

X = torch.zeros(2, 8)


@pytest.mark.parametrize("case", ["A9"])
@spmd(ranks=2)
def test_buffers_of_a_context_are_refused_by_name(mesh, case):
    for buffers, dims, kept, match, error in (
        ([X], [2], set(), r"got x\.shape=\(2, 8\), dim=2: name", ValueError),
        ([X], [1.0], set(), "got dim=1.0", TypeError),
        ([X], None, set(), "got cp_seq_dims of type NoneType", TypeError),
        ([None], [1], set(), "got x of type NoneType", TypeError),
        ([X], [1], None, "got cp_no_restore_buffers=None", TypeError),
    ):
        refused(
            match,
            lambda b=buffers, d=dims, k=kept: create_context_parallel_ctx(mesh, b, d, k),
            error,
        )


@pytest.mark.parametrize("case", ["A9"])
@spmd(ranks=2)
def test_collectives_refuse_by_name(mesh, case):
    layout = HeadTail(8, 2)
    for call, match, error in (
        (lambda: all_gather(X, mesh, dim=2), "all_gather .* dim=2: name", ValueError),
        (lambda: all_gather(None, mesh, dim=0), "got x of type NoneType", TypeError),
        (lambda: reduce_scatter(X, mesh, dim=-3), "reduce_scatter .* dim=-3", ValueError),
        (lambda: ring_shift(X, mesh, by=1.5), "ring_shift .* got by=1.5", TypeError),
        (lambda: all_to_all(X, mesh, receive=[1, 1], send=[3, -1]), "rows=-1", ValueError),
        (lambda: all_to_all(X, mesh, receive=None, send=[1, 1]), "receive=None", TypeError),
        (lambda: halo(X, layout, mesh, left=0.5, right=0), "got left=0.5", TypeError),
        (lambda: relayout.gather(X, None, mesh), "got layout=None", TypeError),
        (lambda: relayout.shard(X, HeadTail, mesh), "got layout=<class", TypeError),
        (lambda: relayout.gather(X[:, :4], layout, mesh, dim=5), "dim=5: name", ValueError),
        (lambda: relayout.roll(X[:, :4], layout, mesh, shift=1.5), "got shift=1.5", TypeError),
        (
            lambda: relayout.relayout(X[:, :4], layout, Contiguous, mesh),
            "relayout moves .* got <class",
            TypeError,
        ),
        (lambda: gather_cp_seq(mesh, [X], 1, 17), "got unpadded_len=17", ValueError),
        (lambda: gather_cp_seq(mesh, None, 1, 8), "got tensors of type NoneType", TypeError),
        (
            lambda: make_cp_batch_and_ctx(mesh, {"input_ids": X.long(), "labels": [0]}),
            "got labels of type list",
            TypeError,
        ),
        (lambda: HybridAttention(inner_ranks=0), "inner_ranks >= 1, got", ValueError),
    ):
        refused(match, call, error)


@pytest.mark.parametrize("style", [RingAttention(), AllGatherAttention(), UlyssesAttention()])
@spmd(ranks=2)
def test_operands_that_are_none_are_refused_by_name_A9(mesh, style):
    """Before anything moves: nobody is left waiting, and the next call is answered."""
    mixer = SoftmaxAttention(Causal())
    apply_plan(ModuleList([mixer]), mesh, {"0": style})
    q = torch.randn(1, 8, 2, 4, dtype=torch.float64)
    batch = {"input_ids": torch.zeros(1, 16, dtype=torch.int64)}
    whole = ParallelMesh.from_device_mesh(mesh)
    metadata = shard_batch(batch, whole, HeadTail, model=mixer)[1].attn_metadata
    for parts, match in (
        ((None, q, q), "got q of type NoneType"),
        ((q, None, q), "got k of type NoneType"),
        ((q, q, 3), "got v of type int"),
        ((q, q.float(), q), "one floating dtype"),
    ):
        refused(match, lambda parts=parts: mixer(*parts, metadata), TypeError)
    refused("got none for ContextParallelAttention", lambda: mixer(q, q, q, None))
    assert mixer(q, q, q, metadata).shape == q.shape


@pytest.mark.parametrize("case", ["A9"])
@spmd(ranks=2)
def test_queries_of_one_row_are_not_rotated_for_all(mesh, case):
    """[L, H, D] was broadcast to every row by the rotation: off by 0.8, without a word."""
    mixer = KeysFromValues(Causal())
    apply_plan(ModuleList([mixer]), mesh, {"0": RingAttention()})
    q, v = torch.randn(2, 8, 2, 4), torch.randn(2, 8, 1, 4)
    batch = {"input_ids": torch.zeros(2, 16, dtype=torch.int64)}
    whole = ParallelMesh.from_device_mesh(mesh)
    sharded = shard_batch(batch, whole, HeadTail, model=mixer)[1]
    position_ids = sharded.shard(sharded.documents.position_ids())
    rest = (position_ids, torch.ones(4), torch.ones(2), sharded.attn_metadata)
    refused(r"got q\.shape=\(8, 2, 4\)", lambda: mixer(q[0], v, *rest))
    refused(r"v\.shape=\(2, 7, 1, 4\)", lambda: mixer(q, v[:, :7], *rest))
    assert mixer(q, v, *rest).shape == q.shape
