"""The bytes that ops count are the bytes that must move, and the bytes that do.

What must move is worked out here from dense tables of who sees whom; what does move is read off
torch's profiler, once, in eager code.
"""

from itertools import product
from math import prod

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F
from torch.profiler import profile

from dtcp.distributed.ledger import OpCount, count_traffic
from dtcp.sdpa.aten_rules import install_sdpa_rules
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Causal, SlidingWindow
from dtcp.sequence.per_document import PerDocument
from dtcp.sequence.row_layouts import RowLayouts
from dtcp.softmax import (
    AllGatherAttention,
    HaloAttention,
    HybridAttention,
    RingAttention,
    UlyssesAttention,
)
from dtcp.softmax.moves import AttentionShape
from tests.harness import packings, reference
from tests.harness.attention_parity import (
    BIDIRECTIONAL,
    CAUSAL,
    IMAGES_IN_WINDOW,
    LAYOUTS,
    MASK_CASES,
    PREFIX,
    SHARED_PROMPT,
    WINDOW,
    Case,
    MaskCase,
    accepts,
    local_inputs,
    mixer_on,
    run,
    shard_case,
    styles,
    truth,
)
from tests.harness.spmd import spmd

SEQ_LEN = 64
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def moved(case, attend, sharded):
    """(forward, backward) traffic of one attention."""
    q, k, v, *sink = inputs = local_inputs(case, sharded)
    with count_traffic() as forward:
        out = attend(q, k, v, sharded.attn_metadata, sink=sink[0] if sink else None)
    with count_traffic() as backward:
        torch.autograd.grad(
            out, inputs, sharded.shard(truth(case, sharded.layout.num_shards).grad_out)
        )
    return forward, backward


def tokens_between(visible, shards):
    """How many keys of each shard the queries of each need: [reader, owner].

    Args:
        visible: [B, S, S].
        shards: positions of each.
    """
    table = visible.any(dim=0).numpy()
    needed = [[table[np.ix_(q, k)].any(axis=0).sum() for k in shards] for q in shards]
    return np.array(needed) * (1 - np.eye(len(shards), dtype=np.int64))


def expected_bytes(style, case, layout, rank):
    """(forward, backward) bytes that the rank has to receive, from who sees whom."""
    n = layout.num_shards
    documents = case.documents(n)
    element = torch.finfo(case.dtype).bits // 8
    width = case.key_dim + case.value_dim
    visible, row_layouts = case.mask_case.visible(documents), [layout]
    if isinstance(layout, RowLayouts):
        row_layouts = list(layout.rows)
    else:
        visible = visible.any(0, keepdim=True).expand_as(visible)
        row_layouts *= documents.batch
    shards = [row.permutation().view(n, -1).numpy() for row in row_layouts]
    if isinstance(style, UlyssesAttention):
        return (by_heads(case, layout.shard_len, n) * element * documents.batch,) * 2
    if isinstance(style, HybridAttention):
        u = style.inner_ranks
        shards, rank = [x.reshape(n // u, -1) for x in shards], rank // u
        kv_heads = max(case.kv_heads, u) // u
        within = by_heads(case, layout.shard_len, u) * element * documents.batch
    else:
        kv_heads, within = case.kv_heads, 0
    # Rows that share a layout send the same tokens, those that any of them needs.
    tokens = sum(tokens_between(row[None], x) for row, x in zip(visible, shards, strict=True))
    required_keys = tokens * kv_heads * width * element
    out, home = required_keys[rank].sum(), required_keys[:, rank].sum()
    kept = keeps_halo(style, layout, tokens.sum(axis=1))
    return within + out, within + home + (0 if kept else out)


def keeps_halo(style, layout, arrived):
    """Whether a window's backward has what arrived in forward, and brings only gradients home.

    Args:
        arrived: tokens, on each rank.
    """
    segments = {Contiguous: 1, HeadTail: 2}.get(type(layout))
    if not isinstance(style, HaloAttention):
        return False
    rows = len(layout.rows) if isinstance(layout, RowLayouts) else 1
    if segments is None:
        return max(arrived) <= rows * layout.shard_len
    room = segments * (style.window - 1 + style.right)
    return room < layout.seq_len - layout.shard_len or layout.num_shards == 2


def by_heads(case, shard_len, ranks):
    """Elements of q, k, v and out that change hands so that each rank has its heads' sequence."""
    heads = case.heads + max(case.kv_heads, ranks)
    return (ranks - 1) * shard_len * heads * (case.key_dim + case.value_dim) // ranks


@pytest.mark.slow_where(lambda layout, ranks: ranks == 4)
@layouts
@spmd(ranks=(1, 2, 3, 4))
def test_bytes_are_those_of_the_keys_that_are_needed(mesh, layout, ranks):
    """Both directions, every strategy, mask and packing; and the planner's formula agrees.

    Of the packings each number of ranks takes another one by turns.
    """
    rank = mesh.get_local_rank()
    masks = MASK_CASES if ranks == 4 else (CAUSAL, IMAGES_IN_WINDOW, SHARED_PROMPT)
    heads = {"heads": 6, "kv_heads": 3} if ranks == 3 else {"heads": 4, "kv_heads": 2}
    rows = (packings.across_borders, packings.last_shard_padding, packings.two_rows)
    for (i, style), (j, mask_case) in product(enumerate(styles(ranks)), enumerate(masks)):
        mixer = mixer_on(mesh, style, mask_case.mask)
        packing = rows[(i + j + LAYOUTS.index(layout) + ranks) % 3]
        seq_len = 48 if ranks == 3 else SEQ_LEN
        case = Case(mask_case, packing, seq_len=seq_len, value_dim=6, sink=False, **heads)
        if not accepts(style, layout, case, ranks):
            continue
        sharded = shard_case(case, mixer, mesh, layout)
        forward, backward = moved(case, mixer, sharded)
        actual = (forward.received, backward.received)
        where = f"on rank {rank} with {style}, {sharded.layout}, {case}"
        assert actual == expected_bytes(style, case, sharded.layout, rank), where
        shape = AttentionShape(sharded.documents.batch, *heads.values(), 8, 6, 8)
        moves = style.moves(mixer, sharded.coords, sharded.layout, rank, shape)
        assert actual == (moves.received.forward, moves.received.backward), where
        sent = (sum(moves.forward.sent), sum(moves.backward.sent))
        assert (forward.sent, backward.sent) == sent, where


@spmd(ranks=(2, 3))
def test_window_brings_gradients_home_only_in_layouts_of_many_pieces(mesh, ranks):
    """Rows of one document and of several, alike or not; more than a shard holds comes again."""
    rank, again = mesh.get_local_rank(), set()
    heads = {"heads": 6, "kv_heads": 3} if ranks == 3 else {}
    for layout, packing in product(
        (DocumentBalanced, PerDocument, BlockBalanced),
        (packings.across_borders, packings.two_rows, packings.equal_rows),
    ):
        case = Case(WINDOW, packing, seq_len=48, sink=False, **heads)
        style = HaloAttention(7)
        mixer = mixer_on(mesh, style, WINDOW.mask)
        sharded = shard_case(case, mixer, mesh, layout)
        forward, backward = moved(case, mixer, sharded)
        actual = (forward.received, backward.received)
        assert actual == expected_bytes(style, case, sharded.layout, rank), (layout, packing)
        total = torch.tensor([forward.sent, backward.received])
        dist.all_reduce(total)
        again.add(bool(total[0] < total[1]))
    assert again == ({False} if ranks == 2 else {False, True})


@spmd(ranks=(2, 4))
def test_what_all_ranks_send_is_what_all_ranks_receive(mesh, ranks):
    case = Case(PREFIX, packings.across_borders, seq_len=SEQ_LEN)
    for style in styles(ranks)[:-1]:
        mixer = mixer_on(mesh, style, PREFIX.mask)
        for traffic in moved(case, mixer, shard_case(case, mixer, mesh, PerDocument)):
            total = torch.tensor([traffic.sent, traffic.received])
            dist.all_reduce(total)
            assert total[0] == total[1] > 0


@spmd(ranks=(2, 4))
def test_whole_sequence_costs_all_other_shards(mesh, ranks):
    """(n - 1) * L * G * (D + V) elements, and three times as much both ways together."""
    for style, layout in product((RingAttention(), AllGatherAttention()), LAYOUTS):
        case = Case(BIDIRECTIONAL, packings.one_document, seq_len=SEQ_LEN)
        mixer = mixer_on(mesh, style, case.mask_case.mask)
        forward, backward = moved(case, mixer, shard_case(case, mixer, mesh, layout))
        bound = (ranks - 1) * (SEQ_LEN // ranks) * 2 * 16 * 8
        assert (forward.received, backward.received) == (bound, 2 * bound)


@spmd(ranks=4)
def test_causal_mask_needs_nothing_that_lies_ahead(mesh):
    """Of contiguous shards rank r reads r; of head-tail shards all but the later tails."""
    rank, row, L = mesh.get_local_rank(), 2 * 16 * 8, SEQ_LEN // 4
    case = Case(CAUSAL, packings.one_document, seq_len=SEQ_LEN)
    for style in (RingAttention(), AllGatherAttention()):
        mixer = mixer_on(mesh, style, CAUSAL.mask)
        forward, backward = moved(case, mixer, shard_case(case, mixer, mesh, Contiguous))
        assert forward.received == rank * L * row
        assert backward.received == (rank + 3 - rank) * L * row
        forward, _ = moved(case, mixer, shard_case(case, mixer, mesh, HeadTail))
        # Its tail chunk sees all heads of the others, and the tails before it.
        assert forward.received == (3 + 3 - rank) * L // 2 * row


@pytest.mark.parametrize("window", [1, 2, 8, 17, 40, 64])
@spmd(ranks=4)
def test_window_costs_its_halo_however_long_the_sequence(mesh, window):
    """min(W - 1, what lies left) tokens a segment, over one hop or several."""
    rank, row, L = mesh.get_local_rank(), 2 * 16 * 8, SEQ_LEN // 4
    mask_case = MaskCase(
        Causal() & SlidingWindow(window),
        lambda _: reference.Both(reference.causal, reference.Window(window)),
    )
    case = Case(mask_case, packings.one_document, seq_len=SEQ_LEN)
    for style in (HaloAttention(window), RingAttention(), AllGatherAttention()):
        mixer = mixer_on(mesh, style, mask_case.mask)
        forward, _ = moved(case, mixer, shard_case(case, mixer, mesh, Contiguous))
        assert forward.received == min(window - 1, rank * L) * row
        if window <= L // 2:
            forward, _ = moved(case, mixer, shard_case(case, mixer, mesh, HeadTail))
            # Rank 3's two chunks are neighbours; rank 0's first has nothing on its left.
            segments = 2 - (rank == 0) - (rank == 3)
            assert forward.received == segments * (window - 1) * row


@pytest.mark.parametrize("layout", [Contiguous, HeadTail])
@spmd(ranks=(2, 4))
def test_backward_of_a_window_brings_gradients_home_and_nothing_else(mesh, layout, ranks):
    """The W - 1 tokens that arrived are kept: one exchange each way, and each sends what it got."""
    case = Case(WINDOW, packings.one_document, seq_len=SEQ_LEN, sink=False)
    mixer = mixer_on(mesh, HaloAttention(7), WINDOW.mask)
    sharded = shard_case(case, mixer, mesh, layout)
    forward, backward = moved(case, mixer, sharded)
    totals = torch.tensor([forward.received, backward.received])
    assert (backward.sent, backward.received) == (forward.received, forward.sent)
    dist.all_reduce(totals)
    assert totals[0] == totals[1] > 0
    assert observed(case, mixer, sharded)[0] == 2
    shape = AttentionShape(1, case.heads, case.kv_heads, case.key_dim, case.value_dim, 8)
    moves = mixer.style.moves(mixer, sharded.coords, sharded.layout, mesh.get_local_rank(), shape)
    assert moves.received.backward == backward.received


@spmd(ranks=4)
def test_documents_inside_their_shards_cost_nothing(mesh):
    case = Case(BIDIRECTIONAL, packings.on_borders, seq_len=SEQ_LEN)
    for style in (RingAttention(), AllGatherAttention()):
        mixer = mixer_on(mesh, style, case.mask_case.mask)
        for traffic in moved(case, mixer, shard_case(case, mixer, mesh, Contiguous)):
            assert (traffic.sent, traffic.received) == (0, 0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@spmd(ranks=4)
def test_ulysses_costs_the_same_for_every_mask(mesh, kv_heads):
    """(n - 1) / n * L * (2 H + 2 max(G, n)) * D elements, each way."""
    for mask_case, layout in zip((CAUSAL, BIDIRECTIONAL, WINDOW, CAUSAL), LAYOUTS, strict=True):
        case = Case(mask_case, heads=8, kv_heads=kv_heads, seq_len=SEQ_LEN)
        mixer = mixer_on(mesh, UlyssesAttention(), mask_case.mask)
        bound = 3 * 16 // 4 * (2 * 8 + 2 * max(kv_heads, 4)) * 8 * 8
        for traffic in moved(case, mixer, shard_case(case, mixer, mesh, layout)):
            assert traffic.received == traffic.sent == bound


@spmd(ranks=4)
def test_half_the_precision_costs_half_the_bytes(mesh):
    """Gradients too travel in the model's dtype."""
    for style in styles(4):
        mixer = mixer_on(mesh, style, WINDOW.mask)
        cost = {}
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            case = Case(WINDOW, dtype=dtype, seq_len=SEQ_LEN)
            sharded = shard_case(case, mixer, mesh, Contiguous)
            cost[dtype] = [traffic.received for traffic in moved(case, mixer, sharded)]
        assert cost[torch.float64] == [2 * x for x in cost[torch.float32]]
        assert cost[torch.float32] == [2 * x for x in cost[torch.bfloat16]]


def observed(case, mixer, sharded):
    """(collectives, bytes received from other ranks) by torch's profiler, forward and backward."""
    inputs = local_inputs(case, sharded)
    with profile(record_shapes=True) as profiler:
        run(case, mixer, sharded, inputs)
    size = torch.finfo(case.dtype).bits // 8
    calls, elements = 0, 0
    for event in profiler.events():
        if event.name == "gloo:recv":
            elements += prod(event.input_shapes[0])
        if event.name == "c10d::alltoall_base_":
            elements += prod(event.input_shapes[0])
        calls += event.name.startswith("c10d::")
    return calls, elements * size


@pytest.mark.slow_where(lambda layout, ranks: ranks == 4)
@layouts
@spmd(ranks=(2, 4))
def test_profiler_sees_the_bytes_that_the_ledger_counts(mesh, layout, ranks):
    """The profiler's all_to_all holds a rank's own part too: a 1 / u share in Ulysses."""
    for index, style in enumerate(styles(ranks)):
        turn = (index + LAYOUTS.index(layout) + ranks // 2) % 2
        packing = (packings.across_borders, packings.one_document)[turn]
        case = Case(IMAGES_IN_WINDOW, packing, seq_len=SEQ_LEN, sink=False)
        if not accepts(style, layout, case, ranks):
            continue
        mixer = mixer_on(mesh, style, case.mask_case.mask)
        sharded = shard_case(case, mixer, mesh, layout)
        with count_traffic() as counted:
            _, seen = observed(case, mixer, sharded)
        own = 0
        if isinstance(style, UlyssesAttention | HybridAttention):
            u = ranks if isinstance(style, UlyssesAttention) else style.inner_ranks
            own = 2 * by_heads(case, sharded.layout.shard_len, u) * 8 // (u - 1)
        assert counted.received + own == seen, f"{style}, {sharded.layout}"


@spmd(ranks=4)
def test_number_of_collectives_is_the_strategys(mesh):
    """One all_to_all brings keys, and one takes gradients home; Ulysses turns twice each way."""
    expected = [
        (AllGatherAttention(), 1 + 2),
        (UlyssesAttention(), 2 + 2),
        (HybridAttention(outer=AllGatherAttention()), 2 + 2 + 1 + 2),
        # A ring of 4 sends and receives 3 shards, again backward, and their gradients.
        (RingAttention(), 3 * 2 * 3),
        # And between 2 groups, one.
        (HybridAttention(), 2 + 2 + 2 * 3),
    ]
    case = Case(BIDIRECTIONAL, packings.one_document, seq_len=SEQ_LEN)
    for style, calls in expected:
        mixer = mixer_on(mesh, style, case.mask_case.mask)
        assert observed(case, mixer, shard_case(case, mixer, mesh, HeadTail))[0] == calls, style


@spmd(ranks=4)
def test_ring_posts_no_transfer_for_what_nobody_sees(mesh):
    case = Case(WINDOW, packings.one_document, seq_len=SEQ_LEN)
    mixer = mixer_on(mesh, RingAttention(), WINDOW.mask)
    calls, _ = observed(case, mixer, shard_case(case, mixer, mesh, Contiguous))
    # Keys from the left and their gradients back, and the same for the right neighbour.
    assert calls == 3 * ((mesh.get_local_rank() > 0) + (mesh.get_local_rank() < 3))


@spmd(ranks=2)
def test_bare_attention_on_dtensors_counts_as_a_ring_does(mesh):
    install_sdpa_rules()
    q, k, v = (
        distribute_tensor(x.detach().transpose(1, 2), mesh, [Shard(2)]).requires_grad_()
        for x in packings.qkv(packings.one_document(SEQ_LEN, 2))
    )
    with count_traffic() as forward:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with count_traffic() as backward:
        torch.autograd.grad(out.sum().full_tensor(), (q, k, v))
    shard = SEQ_LEN // 2 * 2 * 16 * 8
    rank = mesh.get_local_rank()
    assert forward["dtcp::causal_sdpa"] == OpCount(
        1, sent=(1 - rank) * shard, received=rank * shard
    )
    assert backward["dtcp::causal_sdpa_backward"].received == shard
