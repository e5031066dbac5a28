"""Attention over nodes: a key crosses once to each node that reads it, its gradient once home.

Four ranks stand for two nodes of two, eight for two of four.
"""

from copy import deepcopy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel

from dtcp.compile import count_graphs
from dtcp.distributed.mesh import ParallelMesh
from dtcp.mixer_plan import apply_plan, on_nodes
from dtcp.parallelize import ParallelPlan, parallelize
from dtcp.recurrent import (
    CausalConv1d,
    CausalConvCP,
    GatedDeltaCP,
    GatedDeltaRule,
    GatedLinearAttention,
    GatedLinearCP,
)
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import (
    AllGatherAttention,
    HaloAttention,
    HybridAttention,
    RingAttention,
    SharedKVAttention,
    UlyssesAttention,
)
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.softmax.moves import AttentionShape
from dtcp.sparse import CompressedSparseCP
from dtcp.sparse.mixer import CompressedSparseAttention
from dtcp.sparse_blocks import SparseBlockAttention, SparseBlockCP
from dtcp.sparse_latent import SparseLatentAttention, SparseLatentCP
from tests.harness import packings
from tests.harness.attention_parity import (
    BIDIRECTIONAL,
    CAUSAL,
    IMAGES_IN_WINDOW,
    PREFIX,
    SHARED_PROMPT,
    WINDOW,
    WINDOW_AND_SINKS,
    Block,
    Case,
    assert_equals_one_device,
    mixer_on,
    refused,
    shard_case,
)
from tests.harness.spmd import spmd
from tests.harness.two_tier import of_node
from tests.softmax import test_cross, test_latent, test_values_only
from tests.softmax.test_traffic import moved

LAYOUTS = (DocumentBalanced, HeadTail, BlockBalanced)
PACKINGS = (packings.across_borders, packings.one_document, packings.two_rows)
HALO = HaloAttention(7, right=4)
STYLES = (AllGatherAttention(), RingAttention())


def read_by(case, sharded):
    """Keys that a rank reads of each rank, and those that a node reads of it: [n, n], [n, n].

    From a dense table of who sees whom, for rows that share a layout.
    """
    layout = sharded.layout
    dense = case.mask_case.visible(case.documents(layout.num_shards)).any(0).numpy()
    # The layout may have padded the row: nobody reads that.
    visible = np.pad(dense, (0, layout.seq_len - len(dense)))
    shards = layout.permutation().view(layout.num_shards, -1).numpy()
    return np.array([[visible[np.ix_(q, k)].any(axis=0) for k in shards] for q in shards])


def two_tier_bytes(case, sharded, rank, ranks_per_node):
    """(received, of it from other nodes) in a forward pass, of all ranks of this one's node.

    A rank receives each key that it reads once, and its node takes each in once.
    """
    reads = read_by(case, sharded)
    n, m = len(reads), ranks_per_node
    row = case.kv_heads * (case.key_dim + case.value_dim) * 8
    own = np.arange(n) == rank
    node = np.arange(n) // m == rank // m
    of_node = reads[node].any(axis=0)[~node].sum() * row
    return reads[rank][~own].sum() * row, of_node


def assert_bytes(style, case, mesh, layout):
    """What crossed is what is read, to the byte, and what moves() says, in both tiers."""
    rank, m = mesh.get_local_rank(), style.ranks_per_node
    mixer = mixer_on(mesh, style, case.mask_case.mask)
    sharded = shard_case(case, mixer, mesh, layout)
    forward, backward = moved(case, mixer, sharded)
    received, taken_in = two_tier_bytes(case, sharded, rank, m)
    where = f"on rank {rank} with {style}, {sharded.layout}, {case}"
    assert forward.received == received, where
    between = forward.crossing(rank, m)
    assert of_node(between[1], rank, m) == taken_in, where

    shape = AttentionShape(1, case.heads, case.kv_heads, case.key_dim, case.value_dim, 8)
    of = (mixer, sharded.coords, sharded.layout, rank, shape)
    planned, moves = style.received(*of), style.moves(*of)
    counted = (forward.received, backward.received, between[1], backward.crossing(rank, m)[1])
    assert counted == (
        planned.forward,
        planned.backward,
        planned.forward_between,
        planned.backward_between,
    ), where
    assert between == moves.forward.crossing(rank, m), where
    assert backward.crossing(rank, m) == moves.backward.crossing(rank, m), where
    # Gradients go home once: as much goes back as came. A halo was kept, all else is brought again.
    again = 0 if isinstance(style, HaloAttention) else between[0]
    home = backward.crossing(rank, m)[0] - again
    assert home == between[1], where


def assert_equal_on_nodes(mesh, layouts):
    masks = (CAUSAL, SHARED_PROMPT, PREFIX, BIDIRECTIONAL)
    for style, (index, layout) in product(STYLES, enumerate(layouts)):
        case = Case(masks[index], PACKINGS[index % 3], seq_len=32)
        mixer = mixer_on(mesh, replace(style, ranks_per_node=2, tile=8), case.mask_case.mask)
        assert_equals_one_device(case, mixer, mixer, mesh, layout)


@spmd(ranks=4)
def test_two_tier_attention_equals_one_device(mesh):
    assert_equal_on_nodes(mesh, (DocumentBalanced, HeadTail))
    case = Case(IMAGES_IN_WINDOW, packings.across_borders, seq_len=16)
    mixer = mixer_on(mesh, replace(HALO, ranks_per_node=2), case.mask_case.mask)
    assert_equals_one_device(case, mixer, mixer, mesh, Contiguous)


@pytest.mark.slow
@spmd(ranks=4)
def test_two_tier_attention_equals_one_device_in_every_layout(mesh):
    assert_equal_on_nodes(mesh, (PerDocument, Contiguous, BlockBalanced, DocumentBalanced))


@spmd(ranks=4)
def test_two_tier_key_crosses_once_to_each_node(mesh):
    cases = ((DocumentBalanced, CAUSAL), (HeadTail, PREFIX), (HeadTail, WINDOW_AND_SINKS))
    for style, (layout, mask_case) in product(STYLES, cases):
        case = Case(mask_case, packings.across_borders, sink=False)
        assert_bytes(replace(style, ranks_per_node=2), case, mesh, layout)
    case = Case(WINDOW, packings.one_document, sink=False, seq_len=16)
    assert_bytes(replace(HALO, ranks_per_node=2), case, mesh, Contiguous)


@pytest.mark.slow
@pytest.mark.parametrize("ranks_per_node", [2, 4])
@spmd(ranks=8)
def test_two_tier_attention_on_eight_ranks_equals_one_device(mesh, ranks_per_node):
    for (i, plain), (j, layout), (k, packing) in product(
        *map(enumerate, (STYLES, LAYOUTS, PACKINGS))
    ):
        if (i + j + k + ranks_per_node // 2) % 2:
            continue
        style = replace(plain, ranks_per_node=ranks_per_node, tile=8)
        case = Case(CAUSAL, packing, seq_len=96)
        mixer = mixer_on(mesh, style, case.mask_case.mask)
        assert_equals_one_device(case, mixer, mixer, mesh, layout)
        if packing is not packings.two_rows:
            assert_bytes(style, replace(case, sink=False), mesh, layout)


@spmd(ranks=4)
def test_two_tier_graph_is_the_same_on_all_ranks_and_serves_every_batch(mesh):
    for style in STYLES:
        torch._dynamo.reset()
        mixer = mixer_on(mesh, replace(style, ranks_per_node=2, tile=8), CAUSAL.mask)
        attend = torch.compile(Block(mixer), backend="aot_eager", fullgraph=True)
        with count_graphs() as graphs:
            for packing in (packings.across_borders, packings.one_token_documents):
                case = Case(CAUSAL, packing)
                assert_equals_one_device(case, attend, mixer, mesh, DocumentBalanced)
        assert (graphs.breaks, graphs.graphs) == (0, 1), graphs
        metadata = shard_case(case, mixer, mesh, HeadTail).attn_metadata
        shapes = [tuple(x.shape) for x in metadata[mixer.metadata_key].tensors()]
        every = [None] * 4
        dist.all_gather_object(every, shapes)
        assert every == [shapes] * 4


@spmd(ranks=4)
def test_two_tier_refuses_nodes_that_do_not_fit(mesh):
    for ranks_per_node in (3, 8):
        style = AllGatherAttention(ranks_per_node=ranks_per_node)
        refused("equally many ranks of its axis", lambda s=style: mixer_on(mesh, s, CAUSAL.mask))
    refused("takes ranks_per_node >= 0", lambda: AllGatherAttention(ranks_per_node=-1))
    model = nn.ModuleDict({"mixer": SoftmaxAttention(CAUSAL.mask)})
    other = 2 if mesh.get_local_rank() else 4
    plan = {"mixer": AllGatherAttention(ranks_per_node=other)}
    disagree = "all ranks say the same, got ranks_per_node from 2 to 4"
    refused(disagree, lambda: apply_plan(model, mesh, plan))
    from_mesh = ParallelMesh.from_device_mesh
    refused(disagree, from_mesh(mesh, ranks_per_node=other).cp_ranks_per_node)
    refused(r"puts \[1, 3\] of its 4 ranks", from_mesh(mesh, ranks_per_node=3).cp_ranks_per_node)


def test_two_tier_mesh_gives_its_nodes_to_every_style_that_has_none():
    shared, own = RingAttention(), AllGatherAttention(ranks_per_node=4)
    plan = {"0": shared, "1": shared, "2": own, "3": CausalConvCP(), "4": ColwiseParallel()}
    placed = on_nodes(plan, 2)
    assert placed["0"] is placed["1"] and placed["2"] is own and placed["4"] is plan["4"]
    assert placed["0"] == RingAttention(ranks_per_node=2)
    assert placed["3"] == CausalConvCP(ranks_per_node=2)
    assert on_nodes(plan, 0) == plan


@spmd(ranks=4)
def test_two_tier_plan_of_a_mesh_that_knows_its_nodes(mesh):
    """What parallelize applies, of a model of ours and of one of transformers alike."""
    whole = ParallelMesh.from_device_mesh(mesh, ranks_per_node=2)
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(SoftmaxAttention(CAUSAL.mask))])})
    plan = ParallelPlan(tp={}, cp={"blocks.*.mixer": RingAttention()}, blocks=("blocks.*",))
    parallelize(model, replace(whole, hsdp=None), plan)
    attend, mixer = model["blocks"][0], model["blocks"][0].mixer
    assert mixer.style.ranks_per_node == 2
    assert_equals_one_device(Case(CAUSAL, seq_len=32), attend, mixer, mesh, DocumentBalanced)


@spmd(axes={"cp": 2, "tp": 2})
def test_two_tier_nodes_are_counted_in_ranks_of_all_axes(mesh):
    sizes = {0: 0, 1: 1, 2: 1, 4: 2}
    for ranks_per_node, neighbours in sizes.items():
        made = ParallelMesh.from_device_mesh(mesh, ranks_per_node=ranks_per_node)
        assert made.cp_ranks_per_node() == neighbours


def bytes_into_part_of_group(case, sharded, rank, style):
    """What a node takes in of a forward pass, where a group of ranks spans several nodes.

    Queries and outputs of its heads from the group's other nodes; and, of each of its kv heads, the
    keys of those nodes and the ones that the group reads of other groups, each once.
    """
    u, m, length = style.inner_ranks, style.ranks_per_node, sharded.layout.shard_len
    group = np.arange(sharded.layout.num_shards) // u == rank // u
    of_others = read_by(case, sharded)[group].any(axis=0)[~group].sum()
    queries = case.heads // u * m * (u - m) * length
    keys = heads_of_node(case, rank, m, u) * ((u - m) * length + of_others)
    return (queries + keys) * (case.key_dim + case.value_dim) * 8


def check_hybrid(mesh, style, case, layout=DocumentBalanced, attend=None):
    """Against one device; bytes of both tiers; each key of a head crosses once to each node."""
    rank, m = mesh.get_local_rank(), style.ranks_per_node
    mixer = mixer_on(mesh, style, case.mask_case.mask)
    assert_equals_one_device(case, mixer if attend is None else attend(mixer), mixer, mesh, layout)
    case = replace(case, sink=False)
    sharded = shard_case(case, mixer, mesh, layout)
    forward, backward = moved(case, mixer, sharded)
    shape = AttentionShape(1, case.heads, case.kv_heads, case.key_dim, case.value_dim, 8)
    of = (mixer, sharded.coords, sharded.layout, rank, shape)
    planned, moves = style.received(*of), style.moves(*of)
    one = replace(style, ranks_per_node=0).received(*of)
    assert (forward.received, backward.received) == (planned.forward, planned.backward)
    assert of_node(planned.forward, rank, m) == of_node(one.forward, rank, m)
    between = forward.crossing(rank, m), backward.crossing(rank, m)
    assert between == (moves.forward.crossing(rank, m), moves.backward.crossing(rank, m))
    if style.inner_ranks > m:
        expected = bytes_into_part_of_group(case, sharded, rank, style)
        assert of_node(between[0][1], rank, m) == expected
    else:
        _, taken_in = two_tier_bytes(case, sharded, rank, m)
        assert of_node(between[0][1], rank, m) == taken_in
        home = of_node(between[1][0] - between[0][0], rank, m)
        assert home == taken_in, "gradients go home once"


@spmd(ranks=4)
def test_two_tier_hybrid_deals_heads_inside_a_node_and_the_sequence_over_nodes(mesh):
    """Of one kv head, both ranks of a node bring a half each."""
    for outer, kv_heads in product(STYLES, (2, 1)):
        style = HybridAttention(outer=outer, inner_ranks=2, ranks_per_node=2)
        check_hybrid(mesh, style, Case(CAUSAL, packings.across_borders, kv_heads=kv_heads))


@pytest.mark.slow
@pytest.mark.parametrize("ranks_per_node", [2, 4])
@pytest.mark.parametrize("inner_ranks", [2, 4])
@spmd(ranks=8)
def test_two_tier_hybrid_on_eight_ranks(mesh, inner_ranks, ranks_per_node):
    """Groups that are parts of a node, a node, or two nodes."""
    of = {"inner_ranks": inner_ranks, "ranks_per_node": ranks_per_node}
    options = (STYLES, (1, 2, 4), (DocumentBalanced, HeadTail))
    for (i, outer), (j, kv_heads), (k, layout) in product(*map(enumerate, options)):
        if (i + j + k + inner_ranks // 2 + ranks_per_node // 2) % 2:
            continue
        case = Case(PREFIX, packings.across_borders, heads=8, kv_heads=kv_heads, seq_len=96)
        check_hybrid(mesh, HybridAttention(outer=outer, **of), case, layout)


@pytest.mark.slow
@spmd(ranks=4)
def test_two_tier_hybrid_with_copied_heads_compiles_to_one_graph(mesh):
    def compiled(mixer):
        return torch.compile(Block(mixer), backend="aot_eager", fullgraph=True)

    for outer in STYLES:
        style = HybridAttention(outer=outer, inner_ranks=2, ranks_per_node=2)
        case = Case(CAUSAL, packings.across_borders, kv_heads=1)
        with count_graphs() as graphs:
            check_hybrid(mesh, style, case, attend=compiled)
        assert (graphs.breaks, graphs.graphs) == (0, 1), graphs


def heads_of_node(case, rank, ranks_per_node, group_size):
    """Kv heads that the ranks of this one's node attend with, each counted once."""
    copies = max(group_size // case.kv_heads, 1)
    each = max(case.kv_heads // group_size, 1)
    first = rank // ranks_per_node * ranks_per_node
    places = [peer % group_size for peer in range(first, first + ranks_per_node)]
    return len({place * each // copies + head for place in places for head in range(each)})


def check_copied(mesh, case, ranks_per_node, layout, attend=None):
    """Against one device; a node takes each key of each of its heads in once, to the byte."""
    style = UlyssesAttention(ranks_per_node=ranks_per_node)
    n, rank, m = mesh.size(), mesh.get_local_rank(), ranks_per_node
    mixer = mixer_on(mesh, style, case.mask_case.mask)
    assert_equals_one_device(case, mixer if attend is None else attend(mixer), mixer, mesh, layout)
    case = replace(case, sink=False)
    sharded = shard_case(case, mixer, mesh, layout)
    forward, backward = moved(case, mixer, sharded)
    length = sharded.layout.shard_len
    batch = sharded.documents.batch
    shape = AttentionShape(batch, case.heads, case.kv_heads, case.key_dim, case.value_dim, 8)
    of = (mixer, sharded.coords, sharded.layout, rank, shape)
    planned, moves, one = style.received(*of), style.moves(*of), UlyssesAttention().moves(*of)
    between = forward.crossing(rank, m), backward.crossing(rank, m)
    assert (forward.received, backward.received) == (planned.forward, planned.backward)
    assert forward.received == sum(one.forward.received), "no byte more than in one tier"
    assert between == (moves.forward.crossing(rank, m), moves.backward.crossing(rank, m))
    width = case.key_dim + case.value_dim
    of_queries = case.heads // n * m * (n - m) * length * width
    of_keys = heads_of_node(case, rank, m, n) * (n - m) * length * width
    expected = (of_queries + of_keys) * batch * 8
    assert of_node(between[0][1], rank, m) == of_node(between[1][0], rank, m) == expected


@spmd(ranks=4)
def test_two_tier_heads_that_are_copied_cross_once_to_each_node(mesh):
    for kv_heads, layout, packing in (
        (1, DocumentBalanced, packings.across_borders),
        (2, HeadTail, packings.two_rows),
        (4, HeadTail, packings.one_document),
    ):
        check_copied(mesh, Case(CAUSAL, packing, kv_heads=kv_heads, seq_len=32), 2, layout)


@pytest.mark.slow
@spmd(ranks=4)
def test_two_tier_copied_heads_are_one_graph_for_every_batch(mesh):
    def compiled(mixer):
        return torch.compile(Block(mixer), backend="aot_eager", fullgraph=True)

    for layout, packing in zip(LAYOUTS, PACKINGS, strict=True):
        torch._dynamo.reset()
        check_copied(mesh, Case(PREFIX, packing, kv_heads=1), 2, layout, compiled)


@pytest.mark.slow
@pytest.mark.parametrize("ranks_per_node", [2, 4])
@spmd(ranks=8)
def test_two_tier_copied_heads_on_eight_ranks(mesh, ranks_per_node):
    for (i, kv_heads), (j, layout) in product(enumerate((1, 2, 4, 8)), enumerate(LAYOUTS)):
        if (i + j + ranks_per_node // 2) % 2:
            continue
        case = Case(CAUSAL, PACKINGS[(i + j) % 3], heads=8, kv_heads=kv_heads, seq_len=48)
        check_copied(mesh, case, ranks_per_node, layout)


@pytest.mark.slow
@spmd(ranks=6)
def test_two_tier_copies_of_a_head_may_lie_on_two_nodes(mesh):
    """Three copies of each head on nodes of two: the second node has one of both."""
    case = Case(CAUSAL, packings.two_rows, heads=6, kv_heads=2, seq_len=48)
    check_copied(mesh, case, 2, HeadTail)
    check_copied(mesh, case, 3, DocumentBalanced)


def test_two_tier_hybrid_refuses_groups_that_do_not_fit_nodes():
    with pytest.raises(ValueError, match="deals heads out inside a node"):
        HybridAttention(inner_ranks=2, ranks_per_node=3)
    for parts in (
        {"outer": RingAttention(ranks_per_node=2)},
        {"inner": UlyssesAttention(ranks_per_node=2)},
    ):
        with pytest.raises(ValueError, match="splits the ranks of a node itself"):
            HybridAttention(**parts, inner_ranks=2)


def test_two_tier_shared_keys_refuse_two_sizes_of_a_node():
    gather = AllGatherAttention(ranks_per_node=2)
    assert SharedKVAttention(gather).ranks_per_node == 2
    assert SharedKVAttention(ranks_per_node=2).ranks_per_node == 2
    with pytest.raises(ValueError, match="ranks_per_node=4 and 2 in gather"):
        SharedKVAttention(gather, ranks_per_node=4)


EVERY_STYLE = {
    RingAttention: SoftmaxAttention(CAUSAL.mask),
    AllGatherAttention: SoftmaxAttention(CAUSAL.mask),
    UlyssesAttention: SoftmaxAttention(CAUSAL.mask),
    HybridAttention: SoftmaxAttention(CAUSAL.mask),
    SharedKVAttention: SoftmaxAttention(CAUSAL.mask),
    HaloAttention: SoftmaxAttention(WINDOW.mask),
    CompressedSparseCP: CompressedSparseAttention(4, None, scale=1.0),
    SparseLatentCP: SparseLatentAttention(),
    SparseBlockCP: SparseBlockAttention(2, 3),
    GatedDeltaCP: GatedDeltaRule(),
    GatedLinearCP: GatedLinearAttention(),
    CausalConvCP: CausalConv1d(4),
}


@spmd(ranks=4)
def test_two_tier_style_of_every_family_refuses_nodes_that_do_not_divide_and_ranks_that_disagree(
    mesh,
):
    given = {HybridAttention: {"inner_ranks": 1}, HaloAttention: {"window": 7}}
    for kind, mixer in EVERY_STYLE.items():
        of = given.get(kind, {})
        for size, match in (
            (3, "equally many ranks of its axis"),
            (None, "all ranks say the same"),
        ):
            nodes = (2 if mesh.get_local_rank() else 4) if size is None else size
            plan = {"0": kind(**of, ranks_per_node=nodes)}
            model = nn.Sequential(deepcopy(mixer))
            refused(match, lambda model=model, plan=plan: apply_plan(model, mesh, plan))


@pytest.mark.slow
@spmd(ranks=4)
def test_two_tier_keys_of_another_sequence_values_alone_and_latents_equal_one_device(mesh):
    by_heads = (UlyssesAttention(), *(HybridAttention(outer=outer) for outer in STYLES))
    for style in (*STYLES, *by_heads):
        mixer = test_cross.claimed(mesh, replace(style, ranks_per_node=2, tile=5))
        for case, pair in product(test_cross.CASES, test_cross.LAYOUTS[1:3]):
            batches = test_cross.sharded_pair(case, mixer, mesh, pair)
            torch.testing.assert_close(*test_cross.run(case, mixer, *batches))
    for style, kv_heads in product((*STYLES, *by_heads[1:]), (1, 2)):
        for documents in test_values_only.PACKED.values():
            of = (replace(style, ranks_per_node=2), DocumentBalanced, documents, kv_heads)
            test_values_only.assert_equals_one_device(mesh, *of)
    for style, packing in product(STYLES, PACKINGS):
        case = test_latent.LatentCase(packing)
        mixer = test_latent.claimed(mesh, replace(style, ranks_per_node=2, tile=5), case)
        test_latent.assert_equals_truth(case, mixer, mixer, mesh, DocumentBalanced)
