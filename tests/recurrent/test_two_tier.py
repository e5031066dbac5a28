"""States over nodes: a map crosses once to each node that reads it."""

import pytest
import torch

from dtcp.compile import count_graphs
from dtcp.recurrent import GatedDeltaCP, GatherStates
from dtcp.recurrent.moves import DeltaShape
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import BlockBalanced, HeadTail
from dtcp.sequence.stretches import Stretches
from tests.harness.spmd import spmd
from tests.recurrent.test_balanced import DOCUMENTS
from tests.recurrent.test_recurrent import (
    SEQ_LEN,
    H,
    K,
    V,
    assert_equals_the_recurrence,
    layer_on,
    shard_case,
)
from tests.softmax.test_two_tier import of_node

SUMMARY = H * K * (K + V) * 8


def assert_equals_and_counts(mesh, style, documents, layout, kinds, taken_in):
    """Against the recurrence; in both tiers the bytes of both ways are those of moves().

    Args:
        taken_in: summaries that a node takes in of others, by sharded batch, rank and style.
    """
    rank, m = mesh.get_local_rank(), style.ranks_per_node
    layer = layer_on(mesh, style)
    sharded = shard_case(documents, layer, mesh, layout)
    traffic = assert_equals_the_recurrence(documents, layer, sharded, by_channel=False)
    shape = DeltaShape(documents.batch, H, K, V, element_size=8)
    of = (layer.rule, sharded.coords, sharded.layout, rank, shape)
    planned, moves = style.received(*of), style.moves(*of)
    counted = [traffic[kind] for kind in kinds]
    assert sum(each.received for each in counted) == planned.forward + planned.backward
    between = [sum(x) for x in zip(*(each.crossing(rank, m) for each in counted), strict=True)]
    assert between[1] == planned.forward_between + planned.backward_between
    assert between[0] == sum(x.crossing(rank, m)[0] for x in (moves.forward, moves.backward))
    assert of_node(between[1], rank, m) == taken_in(sharded, rank, m) * SUMMARY


def all_segments_of_others(sharded, rank, m):
    """Both ways: every segment of the ranks of other nodes."""
    return 2 * 2 * (sharded.layout.num_shards - m)


def read_along_chains(sharded, rank, m):
    """Both ways: the stretches of other nodes that come before one of this node in a document."""
    stretches = Stretches.of(sharded.layout, sharded.documents)
    node, count = rank // m, 0
    for chain in stretches.chains:
        for along in (chain, chain[::-1]):
            nodes = stretches.rank[along] // m
            last = max((at for at, x in enumerate(nodes) if x == node), default=0)
            count += sum(x != node for x in nodes[:last])
    return count


@spmd(ranks=4)
def test_two_tier_states_equal_the_recurrence_and_cross_once_to_each_node(mesh):
    gathered = GatedDeltaCP(GatherStates(), ranks_per_node=2)
    documents = Documents(((20, 28),), SEQ_LEN)
    kinds = ("dtcp::all_gather_on_nodes",)
    assert_equals_and_counts(mesh, gathered, documents, HeadTail, kinds, all_segments_of_others)
    for name in ("single", "rows"):
        documents = Documents(DOCUMENTS[name], SEQ_LEN)
        along = GatedDeltaCP(ranks_per_node=2)
        of = (mesh, along, documents, DocumentBalanced, ("dtcp::all_to_all",))
        assert_equals_and_counts(*of, read_along_chains)


@pytest.mark.slow
@pytest.mark.parametrize("ranks_per_node", [2, 4])
@spmd(ranks=8)
def test_two_tier_states_on_eight_ranks(mesh, ranks_per_node):
    style = GatedDeltaCP(ranks_per_node=ranks_per_node)
    for lengths in DOCUMENTS.values():
        documents = Documents(lengths, SEQ_LEN)
        for layout in (DocumentBalanced, BlockBalanced):
            of = (mesh, style, documents, layout, ("dtcp::all_to_all",))
            assert_equals_and_counts(*of, read_along_chains)


@pytest.mark.slow
@spmd(ranks=4)
def test_two_tier_states_are_one_graph_for_every_batch(mesh):
    layer = layer_on(mesh, GatedDeltaCP(ranks_per_node=2))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with count_graphs() as graphs:
        for name in ("random", "single"):
            documents = Documents(DOCUMENTS[name], SEQ_LEN)
            sharded = shard_case(documents, layer, mesh, DocumentBalanced)
            assert_equals_the_recurrence(documents, compiled, sharded, by_channel=False)
    assert (graphs.breaks, graphs.graphs) == (0, 1), graphs
