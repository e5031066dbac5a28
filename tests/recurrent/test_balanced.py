"""Recurrent mixers on pieces of any lengths: what crosses is handed on at cuts in documents."""

from itertools import product

import pytest
import torch

from dtcp.compile import count_graphs
from dtcp.recurrent import FewestBytes, GatedDeltaCP, GatedDeltaRule, GatedLinearCP, exchange
from dtcp.recurrent.moves import ChannelShape, DeltaShape, LinearShape
from dtcp.recurrent.state_passing import StatePassing
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.per_document import PerDocument
from dtcp.sequence.stretches import Stretches, left_routes
from tests.harness import work
from tests.harness.spmd import spmd
from tests.recurrent import test_linear
from tests.recurrent.test_recurrent import (
    CHANNELS,
    SEQ_LEN,
    WIDTH,
    H,
    K,
    V,
    assert_equals_the_recurrence,
    layer_on,
    shard_case,
)

BY_DOCUMENT = (DocumentBalanced, PerDocument, BlockBalanced)
DOCUMENTS = {
    "random": ((2, 17, 1, 9, 3, 11),),
    "many short": ((1, 2, 3, 1, 4, 2, 1) * 3,),
    "one long": ((3, SEQ_LEN - 9, 4),),
    "single": ((SEQ_LEN,),),
    "all padding": ((),),
    "rows": ((20, 3, 1, 14), (), (5, 40)),
    "equal rows": ((30, 9), (30, 9)),
}


def assert_equals_and_counts(mesh, layer, compute, documents, layout, by_channel):
    """Against the recurrence, bytes of both ways against the formulas."""
    sharded = shard_case(documents, layer, mesh, layout)
    traffic = assert_equals_the_recurrence(documents, compute, sharded, by_channel=by_channel)
    rank, coords, rows = mesh.get_local_rank(), sharded.coords, documents.batch
    shape = DeltaShape(rows, H, K, V, element_size=8)
    states = layer.rule.style.moves(layer.rule, coords, sharded.layout, rank, shape).received
    assert traffic["dtcp::all_to_all"].received == states.forward + states.backward
    shape = ChannelShape(rows, CHANNELS, 8)
    halo = layer.conv.style.moves(layer.conv, coords, sharded.layout, rank, shape).received
    assert traffic["dtcp::exchange_tokens"].received == halo.forward + halo.backward
    route = left_routes(Stretches.of(sharded.layout, sharded.documents), WIDTH - 1, rank).routes
    tokens = sum(stop - start for side in route.tolist() for r, start, stop in side if r != rank)
    assert halo.forward + halo.backward == tokens * CHANNELS * 8
    total = states + halo
    assert traffic.received == total.forward + total.backward


@spmd(ranks=(2, 3, 4))
def test_rule_and_convolution_on_balanced_documents_equal_the_recurrence(mesh, ranks):
    layer = layer_on(mesh)
    cases = list(product(BY_DOCUMENT, DOCUMENTS))
    cases = [*cases[:7], cases[12], cases[14]] if ranks == 2 else cases[ranks::5]
    for index, (layout, name) in enumerate(cases):
        seq_len = SEQ_LEN if name != "many short" else 2 * SEQ_LEN
        documents = Documents(DOCUMENTS[name], seq_len)
        assert_equals_and_counts(mesh, layer, layer, documents, layout, index % 2 == 1)


@pytest.mark.slow
@spmd(ranks=8)
def test_rule_and_convolution_on_pieces_of_eight_ranks_equal_the_recurrence(mesh):
    layer = layer_on(mesh)
    for layout, name in product(BY_DOCUMENT, ("random", "one long", "rows")):
        documents = Documents(DOCUMENTS[name], SEQ_LEN)
        assert_equals_and_counts(mesh, layer, layer, documents, layout, False)


@spmd(ranks=(2, 3))
def test_mamba_on_balanced_documents_equals_the_recurrence(mesh, ranks):
    mixer = test_linear.claimed(mesh, GatedLinearCP())
    for name, kind in product(("random", "rows"), test_linear.KINDS[:: 2 * ranks - 3]):
        documents = Documents(DOCUMENTS[name], SEQ_LEN)
        sharded = test_linear.shard_case(documents, mixer, mesh, DocumentBalanced)
        moved = test_linear.assert_equals_the_recurrence(documents, kind, mixer, sharded)
        shape, rank = LinearShape(documents.batch, H, K, V, 8), mesh.get_local_rank()
        planned = mixer.style.received(mixer, sharded.coords, sharded.layout, rank, shape)
        assert [x.received for x in moved] == [planned.forward, planned.backward]


@spmd(ranks=2)
def test_graph_of_balanced_documents_serves_rule_and_convolution_of_every_batch(mesh):
    layer = layer_on(mesh)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with count_graphs() as graphs:
        for name in ("random", "one long", "single", "all padding"):
            documents = Documents(DOCUMENTS[name], SEQ_LEN)
            sharded = shard_case(documents, layer, mesh, DocumentBalanced)
            assert_equals_the_recurrence(documents, compiled, sharded)
    assert (graphs.graphs, graphs.breaks) == (1, 0)


def test_what_crosses_is_per_piece_that_starts_inside_a_document():
    """Documents that are whole on a rank hand nothing on, however many there are."""
    documents = Documents(((4, 4, 4, 4, 16, 16),), 48)
    whole = BlockBalanced(48, 3, 16, (0, 1, 2))
    assert Stretches.of(whole, documents).chains == []
    documents = Documents(((4, 4, 24, 16),), 48)
    cut = BlockBalanced(48, 3, 8, (0, 1, 2, 1, 2, 0))
    stretches = Stretches.of(cut, documents)
    names = [[(stretches.rank[x], stretches.index[x]) for x in y] for y in stretches.chains]
    assert names == [[(1, 0), (2, 0), (1, 1)], [(2, 1), (0, 1)]]
    shape = DeltaShape(1, 1, 2, 3, element_size=4)
    style, rule, coords = GatedDeltaCP(FewestBytes()), GatedDeltaRule(), Coords.of(documents)
    moved = [style.received(rule, coords, cut, rank, shape) for rank in range(3)]
    summary = 2 * 5 * 4
    assert [(x.forward, x.backward) for x in moved] == [
        (summary, 0),
        (summary, summary),
        (summary, 2 * summary),
    ]
    assert left_routes(stretches, 3, 0).routes.shape == (2, 4, 3)


def test_a_document_of_many_pieces_is_planned_as_one_of_few():
    works = []
    for pieces in (2, 64):
        seq_len = 3 * 4 * pieces
        layout = BlockBalanced(seq_len, 3, 4, (0, 1, 2) * pieces)
        stretches = Stretches.of(layout, Documents.single(1, seq_len))
        assert len(stretches.chains[0]) == 3 * pieces
        works.append(work.calls_of(lambda s=stretches: StatePassing.of(s, 1, reverse=False)))
    assert works[0] == works[1]


def test_which_states_are_sent_reaches_a_gpu_without_waiting_for_it(monkeypatch):
    """The host knows it; each layer reads it, forward and backward."""
    copied = []
    monkeypatch.setattr(exchange, "on_device", lambda x, device: copied.append(x.tolist()) or x)
    monkeypatch.setattr(exchange, "all_to_all", lambda rows, axis, receive, send: rows)
    passing = (
        torch.tensor([1, -1]),
        torch.ones(2, 1).long(),
        torch.tensor([[1, 2, 0], [-1, 0, 0]]),
    )
    entering = exchange.entering_along_chains(torch.randn(2, 1, 3, 5), passing, axis=None)
    assert copied == [[1]] and entering.shape == (2, 1, 3, 2)
