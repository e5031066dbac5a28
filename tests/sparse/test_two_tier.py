"""Compressed entries over nodes: they cross once to each node, gradients once home."""

import pytest

from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sparse import CompressedSparseCP, SparseShape
from tests.harness.spmd import spmd
from tests.sparse.test_sparse import (
    DIM,
    HEAVY,
    INDEX_DIM,
    ROWS,
    SPARSE,
    assert_equals_one_device,
)


def check(mesh, kind, layout, compiled):
    style, rank = CompressedSparseCP(ranks_per_node=2), mesh.get_local_rank()
    mixer, sharded, there, back = assert_equals_one_device(mesh, kind, style, layout, compiled)
    shape = SparseShape(len(ROWS), DIM, INDEX_DIM, 8)
    of = (mixer, sharded.coords, sharded.layout, rank, shape)
    planned, one_tier = style.received(*of), CompressedSparseCP().moves(*of)
    assert (there.received, back.received) == (planned.forward, planned.backward)
    between = (there.crossing(rank, 2)[1], back.crossing(rank, 2)[1])
    assert between == (planned.forward_between, planned.backward_between)
    # Of two ranks that gather, one takes a node's entries in for both.
    gathered = there["dtcp::all_gather_on_nodes"]
    assert gathered.crossing(rank, 2)[1] * 3 == gathered.received
    assert between[0] < one_tier.forward.crossing(rank, 2)[1]
    assert between[1] < one_tier.backward.crossing(rank, 2)[1]


@spmd(ranks=4)
def test_two_tier_entries_equal_one_device_and_cross_once_to_each_node(mesh):
    check(mesh, SPARSE, HeadTail, False)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Contiguous, HeadTail])
@pytest.mark.parametrize("kind", [HEAVY, SPARSE], ids=["heavy", "sparse"])
@spmd(ranks=4)
def test_two_tier_entries_compiled(mesh, kind, layout):
    check(mesh, kind, layout, True)
