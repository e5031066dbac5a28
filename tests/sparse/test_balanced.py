"""Compressed sparse attention on pieces of any lengths: entries go where documents go on."""

from itertools import product

import pytest

from dtcp.compile import count_graphs
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sparse import CompressedSparseCP
from dtcp.sparse.moves import SparseShape
from tests.harness.spmd import spmd
from tests.sparse.test_sparse import (
    DIM,
    HEAVY,
    INDEX_DIM,
    KINDS,
    SEQ_LEN,
    SPARSE,
    WINDOW,
    assert_equals_one_device,
    collectives,
    mixer_of,
)

PACKINGS = {
    "random": ((2, 17, 1, 9, 3, 11), (30, 9)),
    "many short": ((1, 2, 3, 1, 4, 2, 1, 7, 8), (3,) * 16),
    "one long": ((3, 39, 4), (48,)),
    "all padding": ((), (20, 28)),
    "equal rows": ((30, 9), (30, 9)),
}


def assert_equals_and_counts(mesh, kind, packing, compiled=False):
    """Against one device, bytes of both ways against the formula."""
    style, layout = CompressedSparseCP(), DocumentBalanced
    outcome = assert_equals_one_device(mesh, kind, style, layout, compiled, packing)
    mixer, sharded, there, back = outcome
    shape, rank = SparseShape(2, DIM, INDEX_DIM, 8), mesh.get_local_rank()
    moves = style.moves(mixer, sharded.coords, sharded.layout, rank, shape)
    for moved, stated in zip((there, back), (moves.forward, moves.backward), strict=True):
        assert (moved.sent, moved.received) == (sum(stated.sent), sum(stated.received))
    assert collectives(there) <= 3 and collectives(back) <= 2


@spmd(ranks=(2, 3, 4))
def test_sparse_attention_on_balanced_documents_equals_one_device(mesh, ranks):
    cases = [(SPARSE, "random"), (HEAVY, "one long"), (None, "many short")]
    for kind, name in cases if ranks == 2 else cases[ranks - 3 : ranks - 2]:
        assert_equals_and_counts(mesh, kind, PACKINGS[name])


@pytest.mark.slow
@spmd(ranks=(2, 3, 4, 8))
def test_every_sparse_attention_on_balanced_documents_equals_one_device(mesh, ranks):
    for kind, name in product(KINDS, PACKINGS):
        assert_equals_and_counts(mesh, kind, PACKINGS[name])


@spmd(ranks=2)
def test_graph_of_balanced_documents_serves_sparse_attention_of_every_batch(mesh):
    with count_graphs() as graphs:
        for name in ("many short", "all padding"):
            assert_equals_and_counts(mesh, SPARSE, PACKINGS[name], compiled=True)
    assert (graphs.graphs, graphs.breaks) == (1, 0)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_what_crosses_of_sparse_attention_is_left_of_cuts_in_documents(ranks):
    """Counted token by token: keys of windows, tokens of open windows, entries of documents."""
    lengths = (2, 17, 1, 90, 3, 41, 60)
    documents = Documents((lengths,), 240)
    layout = DocumentBalanced.for_batch(documents, ranks)
    owner, start = {}, {}
    for rank in range(ranks):
        owner |= dict.fromkeys(layout.token_indices(rank).tolist(), rank)
    for number, length in enumerate(lengths):
        first = sum(lengths[:number])
        start |= dict.fromkeys(range(first, first + length), first)
    style, shape, coords = CompressedSparseCP(), SparseShape(1, 1, 0, 1), Coords.of(documents)
    ratio = HEAVY.ratio
    for rank in range(ranks):
        keys, pooled, entries = set(), set(), set()
        for token in (x for x in start if owner[x] == rank):
            keys |= set(range(max(start[token], token - WINDOW + 1), token))
            closed = range(start[token] + ratio - 1, token + 1, ratio)
            entries |= {x for x in closed if owner[x] != rank}
            if token in closed:
                pooled |= set(range(token - ratio + 1, token))
        moves = style.moves(mixer_of(HEAVY), coords, layout, rank, shape)
        counts = [sum(owner[x] != rank for x in some) for some in (keys, pooled, entries)]
        assert moves.received.forward >= counts[0] + 2 * counts[1] + counts[2]
        # A halo of tokens to pool is as long as the reach, or as the document's part left of it.
        cuts = [x for x in start if owner[x] == rank and x > start[x] and owner[x - 1] != rank]
        reach = [x - max(start[x], x - ratio + 1) for x in cuts]
        assert moves.received.forward <= counts[0] + 2 * sum(reach) + counts[2]


def test_documents_that_are_whole_on_a_rank_move_nothing():
    documents = Documents(((24, 24),), SEQ_LEN)
    layout = DocumentBalanced(SEQ_LEN, 2, (0, 24), (0, 1))
    shape = SparseShape(1, DIM, INDEX_DIM, 8)
    for kind, rank in product(KINDS, range(2)):
        mixer, style = mixer_of(kind), CompressedSparseCP()
        received = style.moves(mixer, Coords.of(documents), layout, rank, shape).received
        assert (received.forward, received.backward) == (0, 0)
