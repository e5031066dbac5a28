"""Entries and halos over nodes: each crosses once to a node that reads it, gradients once home."""

from itertools import product

import pytest
import torch

from dtcp.compile import count_graphs
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sparse import CompressedSparseCP, SparseShape
from dtcp.sparse.exchange import bring_left
from tests.harness.spmd import spmd
from tests.harness.two_tier import owners_and_starts
from tests.sparse.test_balanced import PACKINGS
from tests.sparse.test_sparse import (
    DIM,
    HEADS,
    HEAVY,
    INDEX_DIM,
    INDEX_HEADS,
    ROWS,
    SPARSE,
    WINDOW,
    assert_equals_one_device,
    mixer_of,
)


def check(mesh, kind, layout, compiled, packing=ROWS, ranks_per_node=2):
    """Against one device; bytes of both ways, in all and between nodes, against the formula."""
    style, rank = CompressedSparseCP(ranks_per_node=ranks_per_node), mesh.get_local_rank()
    outcome = assert_equals_one_device(mesh, kind, style, layout, compiled, packing)
    mixer, sharded, there, back = outcome
    index = INDEX_HEADS if kind is not None and kind.selected is not None else 0
    shape = SparseShape(len(ROWS), DIM, INDEX_DIM, 8, heads=HEADS, index_heads=index)
    of = (mixer, sharded.coords, sharded.layout, rank, shape)
    moves = style.moves(*of)
    for moved, stated in zip((there, back), (moves.forward, moves.backward), strict=True):
        assert (moved.sent, moved.received) == (sum(stated.sent), sum(stated.received))
        assert moved.crossing(rank, ranks_per_node) == stated.crossing(rank, ranks_per_node)
    return moves, CompressedSparseCP().moves(*of), there


@spmd(ranks=4)
def test_two_tier_entries_equal_one_device_and_cross_once_to_each_node(mesh):
    rank = mesh.get_local_rank()
    two, one, there = check(mesh, SPARSE, HeadTail, False)
    # Of two ranks that gather, one takes a node's entries in for both.
    gathered = there["dtcp::all_gather_on_nodes"]
    assert gathered.crossing(rank, 2)[1] * 3 == gathered.received
    assert two.forward.crossing(rank, 2)[1] < one.forward.crossing(rank, 2)[1]
    assert two.backward.crossing(rank, 2)[1] < one.backward.crossing(rank, 2)[1]


@spmd(ranks=4)
def test_two_tier_entries_of_balanced_documents_equal_one_device(mesh):
    for kind, name in ((SPARSE, "one long"), (HEAVY, "random")):
        check(mesh, kind, DocumentBalanced, False, PACKINGS[name])


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Contiguous, HeadTail])
@pytest.mark.parametrize("kind", [HEAVY, SPARSE], ids=["heavy", "sparse"])
@spmd(ranks=4)
def test_two_tier_entries_compiled(mesh, kind, layout):
    check(mesh, kind, layout, True)


@pytest.mark.slow
@spmd(ranks=4)
def test_two_tier_entries_of_balanced_documents_are_one_graph_for_every_batch(mesh):
    with count_graphs() as graphs:
        # Of as many hops each, up to a power of two, as in one tier.
        for name in ("random", "one long", "equal rows"):
            check(mesh, SPARSE, DocumentBalanced, True, PACKINGS[name])
    assert (graphs.graphs, graphs.breaks) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("ranks_per_node", [2, 4])
@spmd(ranks=8)
def test_two_tier_entries_on_eight_ranks(mesh, ranks_per_node):
    for kind, name in product((None, HEAVY, SPARSE), PACKINGS):
        check(mesh, kind, DocumentBalanced, False, PACKINGS[name], ranks_per_node)
    for kind, layout in product((HEAVY, SPARSE), (HeadTail, BlockBalanced)):
        check(mesh, kind, layout, False, ranks_per_node=ranks_per_node)


LENGTHS = (2, 17, 1, 90, 3, 41, 70)
"""Of a row of 240 tokens that eight ranks share; the last 16 are padding."""


@pytest.mark.parametrize("ranks_per_node", [2, 4])
@pytest.mark.parametrize("layout", [DocumentBalanced, Contiguous, HeadTail])
@pytest.mark.parametrize("kind", [None, HEAVY], ids=["window", "heavy"])
def test_two_tier_bytes_of_a_node_are_what_its_ranks_read_of_others(kind, layout, ranks_per_node):
    """Token by token, with documents, or segments, shorter than a window."""
    documents, ranks, m = Documents((LENGTHS,), 240), 8, ranks_per_node
    placed, coords = layout.for_batch(documents, ranks), Coords.of(documents)
    by_document = layout is DocumentBalanced
    owner, start = owners_and_starts(placed, LENGTHS)
    style, shape = CompressedSparseCP(ranks_per_node=m), SparseShape(1, 1, 0, 1)
    mixer, real = mixer_of(kind), sum(LENGTHS)
    cut = [x for x in range(1, 240) if owner[x] != owner[x - 1]]
    ends = {x for x in range(real) if (x - start[x] + 1) % HEAVY.ratio == 0}
    for node in range(ranks // m):
        halos = {1: set(), 2: set()}  # by channels: keys, and a value and a gate to pool
        entries = set()
        for token in (x for x in cut if owner[x] // m == node):
            for channels, reach in ((1, WINDOW - 1), (2, HEAVY.reach)):
                least = start[token] if by_document else 0
                halos[channels] |= set(range(max(least, token - reach), token))
        for token in (x for x in range(real) if owner[x] // m == node):
            entries |= {x for x in ends if start[token] <= x <= token}
        expected = sum(owner[x] // m != node for x in halos[1])
        if kind is not None:
            expected += 2 * sum(owner[x] // m != node for x in halos[2])
            if by_document:
                expected += sum(owner[x] // m != node for x in entries)
            else:
                room = -(-placed.segment_len // kind.ratio) * len(placed.segments(0))
                expected += (ranks - m) * room
        moves = [style.moves(mixer, coords, placed, r, shape) for r in range(ranks)]
        members = range(node * m, node * m + m)
        assert sum(moves[r].forward.crossing(r, m)[1] for r in members) == expected
        # Gradients go home once.
        assert sum(moves[r].backward.crossing(r, m)[0] for r in members) == expected


@spmd(ranks=4)
def test_two_tier_gradients_are_summed_inside_a_node_in_fp32(mesh):
    """Of bf16: 256 + 1 would be 256 wherever a sum is rounded on its way."""
    rank = mesh.get_local_rank()
    x = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    none = torch.zeros(1, 2, 2, 3, dtype=torch.int64)
    routes, onward = none.clone(), none.clone()
    # Rank 0's token goes to rank 2, which hands it on to itself, twice, and to rank 3.
    routes[0, 0, 0] = torch.tensor([2, 0, 1]) * (rank == 0)
    routes[0, 1, 0] = torch.tensor([0, 0, 1]) * (rank == 2)
    if rank == 2:
        onward[0, 0] = torch.tensor([[2, 0, 1], [3, 0, 1]])
        onward[0, 1, 0] = torch.tensor([2, 1, 2])
    elif rank == 3:
        onward[0, 1, 0] = torch.tensor([2, 0, 1])
    (out,) = bring_left([x], routes, onward, [2], mesh.get_group().group_name)
    grads = torch.tensor([256.0, 1] if rank == 2 else [1.0, 0]).bfloat16()
    (grad,) = torch.autograd.grad(out, x, grads.view(1, 2, 1))
    assert grad.item() == (258 if rank == 0 else 0)
