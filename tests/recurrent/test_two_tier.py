"""States over nodes: a map crosses once to each node that reads it."""

import pytest
import torch

from dtcp.compile import count_graphs
from dtcp.mixer_plan import apply_plan
from dtcp.recurrent import CausalConv1d, CausalConvCP, GatedDeltaCP, GatherStates, ScanStates
from dtcp.recurrent.metadata import SEGMENTED
from dtcp.recurrent.moves import ChannelShape, DeltaShape
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from dtcp.sequence.stretches import Stretches
from tests.harness.spmd import spmd
from tests.harness.two_tier import of_node, owners_and_starts
from tests.recurrent.test_balanced import DOCUMENTS
from tests.recurrent.test_recurrent import (
    CHANNELS,
    SEQ_LEN,
    H,
    K,
    Layer,
    V,
    assert_equals_the_recurrence,
    layer_on,
    shard_case,
)

SUMMARY = H * K * (K + V) * 8


def assert_equals_and_counts(mesh, style, documents, layout, kinds, taken_in):
    """Against the recurrence; in both tiers the bytes of both ways are those of moves().

    Args:
        kinds: the ops that move states.
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


def composed_by_nodes(sharded, rank, m):
    """Both ways, of two segments a rank: a state from the left and a pair from the right."""
    node, nodes = rank // m, sharded.layout.num_shards // m
    left, right = (x.bit_length() for x in (node, nodes - 1 - node))
    return 2 * (left + 2 * right) * sharded.documents.batch


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
    scanned = GatedDeltaCP(ScanStates(), ranks_per_node=2)
    of = (mesh, scanned, documents, HeadTail, ("dtcp::all_to_all",))
    assert_equals_and_counts(*of, composed_by_nodes)
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
    scanned = GatedDeltaCP(ScanStates(), ranks_per_node=ranks_per_node)
    for lengths in DOCUMENTS.values():
        documents = Documents(lengths, SEQ_LEN)
        of = (mesh, scanned, documents, HeadTail, ("dtcp::all_to_all",))
        assert_equals_and_counts(*of, composed_by_nodes)


@pytest.mark.parametrize("ranks_per_node", [2, 4])
@pytest.mark.parametrize("layout", [DocumentBalanced, PerDocument, Contiguous, HeadTail])
def test_two_tier_halo_bytes_of_a_node_are_what_its_ranks_read_of_others(layout, ranks_per_node):
    """Token by token; some stretches are shorter than what a convolution reads to the left."""
    lengths, ranks, m, width = (2, 17, 1, 90, 3, 41, 70), 8, ranks_per_node, 13
    documents = Documents((lengths,), 240)
    placed, coords = layout.for_batch(documents, ranks), Coords.of(documents)
    owner, start = owners_and_starts(placed, lengths)
    style, conv, shape = CausalConvCP(ranks_per_node=m), CausalConv1d(width), ChannelShape(1, 1, 1)
    moves = [style.moves(conv, coords, placed, rank, shape) for rank in range(ranks)]
    for node in range(ranks // m):
        halo = set()
        for token in range(1, 240):
            if owner[token] // m == node and owner[token] != owner[token - 1]:
                least = 0 if issubclass(layout, SEGMENTED) else start[token]
                halo |= set(range(max(least, token - width + 1), token))
        expected = sum(owner[x] // m != node for x in halo)
        members = range(node * m, node * m + m)
        assert sum(moves[rank].forward.crossing(rank, m)[1] for rank in members) == expected
        assert sum(moves[rank].backward.crossing(rank, m)[0] for rank in members) == expected


@spmd(ranks=4)
def test_two_tier_halo_of_stretches_shorter_than_a_convolution_equals_the_recurrence(mesh):
    """Ranks hold one token each: 2 and 3 of the second node both read what 0 and 1 hold."""
    documents = Documents(((8, 40),), SEQ_LEN)
    style = CausalConvCP(ranks_per_node=2)
    layer = Layer()
    apply_plan(layer, mesh, {"conv": style, "rule": GatedDeltaCP(ranks_per_node=2)})
    sharded = shard_case(documents, layer, mesh, PerDocument)
    traffic = assert_equals_the_recurrence(documents, layer, sharded, by_channel=False)
    of = (layer.conv, sharded.coords, sharded.layout, mesh.get_local_rank())
    moves = style.moves(*of, ChannelShape(1, CHANNELS, 8))
    both, halo = moves.forward + moves.backward, traffic["dtcp::exchange_tokens"]
    assert (halo.sent, halo.received) == (sum(both.sent), sum(both.received))
    assert halo.crossing(of[3], 2) == both.crossing(of[3], 2)
    one = CausalConvCP().moves(*of, ChannelShape(1, CHANNELS, 8))
    assert halo.crossing(of[3], 2)[0] < (one.forward + one.backward).crossing(of[3], 2)[0]


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
